"""What several tests of the trainer need."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture
def alone() -> Iterator[None]:
    """A run in the process of the test leaves no process group behind."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
