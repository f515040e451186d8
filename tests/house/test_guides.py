"""What the guides show is read: every YAML block is a valid job, every shipped job too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from raymill.pipeline import check_file, load_job

ROOT = Path(__file__).parents[2]
GUIDES = {name: (ROOT / "platform" / name).read_text() for name in ("DATA.md", "SERVING.md", "TRAINING.md")}
BLOCKS = [block for guide in GUIDES.values() for block in re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: " ".join(block.split()[:4]))
def test_a_block_of_a_guide_is_a_job(block: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("name: guide\n" + block)
    job = load_job(tmp_path / "job.yaml", [])
    assert job.stages()
    if job.train is not None:
        job.train.check_layout(job.train.num_workers)


def test_the_guides_have_blocks() -> None:
    assert len(BLOCKS) == 12


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda path: path.name)
def test_a_shipped_job_is_valid(path: Path) -> None:
    assert check_file(path) == "job"
