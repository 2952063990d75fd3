"""Papers written as records of the Datasets API's `s2orc`."""

import json
from collections.abc import Iterator

from data_tools.papers import Paper


def s2orc_record(paper: Paper, copy: int = 0) -> dict[str, object]:
    """A paper as a record; a `copy` of it has ids of its own."""
    text = "\n"
    spans: dict[str, list[dict[str, object]]] = {}
    for kind, stretch, depth in _stretches(paper):
        attributes = {"n": ".".join("1" * depth)} if depth else {}
        span = {"start": len(text), "end": len(text) + len(stretch), "attributes": attributes}
        spans.setdefault(kind, []).append(span)
        text += stretch + "\n"
    annotations = {kind: json.dumps(found) for kind, found in spans.items()}
    pmc_id = int((paper.pmc_id or "PMC1").removeprefix("PMC")) + copy * 10**8
    ids = {"pubmedcentral": str(pmc_id), "doi": f"{paper.doi or '10.1/none'}-{copy}", "pubmed": None}
    source = {"oainfo": {"license": paper.license}}
    content = {"source": source, "text": text, "annotations": annotations}
    return {"corpusid": paper.source.position + copy * 10**6, "externalids": ids, "content": content}


def _stretches(paper: Paper) -> Iterator[tuple[str, str, int]]:
    yield "title", paper.title, 0
    yield from (("abstract", text, 0) for text in paper.abstract)
    for block in paper.sections:
        yield "sectionheader" if block.depth else "paragraph", block.text, block.depth
