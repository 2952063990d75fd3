"""A shard read: its papers, how far it is read, and the checksum of its files, all in one pass."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import xxhash

from data_tools.errors import UserError
from data_tools.inputs import InputFile, add_file, known_reader
from data_tools.manifest import Inputs
from data_tools.papers import Paper, Rejected
from data_tools.streams import InputStream, is_url, opened


class ShardReader:
    """Iterates once over the papers and rejected records of a shard.

    Args:
        files: of the shard, in order.
    """

    def __init__(self, files: Sequence[InputFile]) -> None:
        self._files = files
        self._digest = xxhash.xxh3_128()
        self._bytes_before = 0
        self._open: list[InputStream] = []

    @property
    def position(self) -> int:
        """How many bytes of the files as stored have been read."""
        return self._bytes_before + sum(stream.position for stream in self._open)

    def __iter__(self) -> Iterator[Paper | Rejected]:
        """The records of all files, in order.

        Raises:
            UserError: a file is missing, cannot be read, is damaged as a whole, or has another size than it
                had when it was found.
        """
        for file in self._files:
            try:
                yield from self._read(file)
            except OSError as error:
                raise UserError(f"The input {file.path} cannot be read: {error}.") from error

    def inputs(self) -> Inputs:
        """What a part records of its input, after the last record: equal to `inputs.describe`."""
        files = self._files
        return Inputs(files[0].name, len(files), sum(file.bytes for file in files), self._digest.hexdigest())

    def _read(self, file: InputFile) -> Iterator[Paper | Rejected]:
        parts = file.parts()
        with ExitStack() as stack:
            self._open = [stack.enter_context(opened(part.path, part.name)) for part in parts]
            companion = self._open[1] if file.companion else None
            yield from known_reader(file.path).read(self._open[0], file.name, companion)
            for part, opened_part in zip(parts, self._open, strict=True):
                add_file(self._digest, part, opened_part.checksum())
            size = sum(stream.position for stream in self._open)
            if size != file.bytes and (file.bytes or not is_url(file.path)):  # not every server says
                raise UserError(
                    f"The input {file.path} changed while it was read: it has {size} bytes and had "
                    f"{file.bytes}; run the command again when it is finished."
                )
            self._bytes_before += size
            self._open = []
