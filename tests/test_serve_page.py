"""The page at `/`, in a real browser; a link to it asks at once, so that nothing has to click."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlencode

import pytest

pytest.importorskip("fastapi")

from banks import decoder_bank, encoder_bank
from lotr import CoreBank
from lotr.training.tasks.served import load_served
from servers import Client, serving

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


def shown(client: Client, folder: Path, **fields: str) -> str:
    """Return the page as it is after a while."""
    words = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'browser'}"]
    words += ["--virtual-time-budget=30000", "--dump-dom"]
    url = f"http://127.0.0.1:{client.port}/#{urlencode(fields)}"
    done = subprocess.run(
        [str(BROWSER), *words, url], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.split("<script>")[0]


@pytest.mark.parametrize("make", [encoder_bank, decoder_bank])
def test_a_task_is_tried_by_hand(make: Callable[..., CoreBank], tmp_path: Path) -> None:
    make(tmp_path, tasks=3).close()
    served = load_served(tmp_path / "bank")
    served.tokenizer.eos_token = None  # what is drawn may end at once otherwise
    if served.kind == "causal-lm":
        served.model.generation_config.eos_token_id = None
    with serving(tmp_path, served) as client:
        page = shown(client, tmp_path, task="task-1", text="the red thing")
        answer = re.search(r'<div id="answer" role="status" class="(.*?)">(.*?)</div>\n<h2>', page, re.DOTALL)
        assert answer is not None and answer[1] == ""
        assert answer[2].count("<meter") == 3 if make is encoder_bank else len(answer[2]) > 20
        assert '<option value="task-2">' in page and "<td>tasks</td><td>3</td>" in page
        wrong = shown(client, tmp_path, task="<b>none", text="a")
        assert 'class="wrong"' in wrong and "no task '&lt;b&gt;none'" in wrong
