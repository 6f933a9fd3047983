"""Experts of one parameter through the commands: LoRAs in, answers over HTTP, new tasks, scores, LoRAs out."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import saved_models
from commands import report
from loras import lora
from lotr.training.tasks.served import load_served
from moe_models import EXPERTS

pytest.importorskip("fastapi")
from servers import Counted, serving

PROMPTS = ["the red thing", "a very old blue", "what colour is the thing here ?", "green"]
TASKS = ("t0", "t1", "t2")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Mixtral, three LoRAs of PEFT on its experts and queries, and the bank that the command made of them."""
    folder = tmp_path_factory.mktemp("experts")
    saved_models.save_mixtral(folder / "model")
    fields: Any = {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "task_type": "CAUSAL_LM"}
    for n, name in enumerate(TASKS):
        lora(folder / "loras" / name, n, lambda: base(folder), folder / "model", r=2, lora_alpha=4, **fields)
    words = ("--modes", "task,expert", "--rank", 32, "--dtype", "float32")
    told = report("compress", folder / "loras" / "*", "--output", folder / "bank", *words)
    assert told["error"] < 1e-5 and {"sites": 4} in [{"sites": group["sites"]} for group in told["groups"]]
    return folder


def base(folder: Path) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder / "model")
    return model


def merged(place: Path, adapter: Path) -> nn.Module:
    """Return a plain model whose weights PEFT has merged a LoRA into."""
    return PeftModel.from_pretrained(base(place), adapter).merge_and_unload().eval()


def written(model: Any, tokenizer: Any, prompt: str, tokens: int) -> tuple[str, str]:
    """What a model writes to a prompt alone: the whole text, and the answer by itself."""
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0)[0]
    answer = ids[inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True), tokenizer.decode(answer, skip_special_tokens=True)


def continued(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """How a model goes on with a text."""
    return written(model, tokenizer, prompt, tokens)[0].removeprefix(prompt)


def test_tenants_in_one_batch_are_answered_as_each_lora_alone_merged_by_peft(place: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    asked = [(task, prompt, 4 + n) for n, prompt in enumerate(PROMPTS) for task in TASKS]
    models = {task: merged(place, place / "loras" / task) for task in TASKS}
    expected = [continued(models[task], tokenizer, *rest) for task, *rest in asked]
    assert len(set(expected)) > 6  # the tasks do write otherwise
    model = Counted(load_served(place / "bank"))
    together = {"max_batch": len(asked), "max_wait": 60_000}
    with serving(place, model.served, **together) as client, ThreadPoolExecutor(len(asked)) as pool:

        def send(one: tuple[Any, ...]) -> str:
            body = dict(zip(("model", "prompt", "max_tokens"), one, strict=True)) | {"temperature": 0}
            status, answer, _ = client.send("POST", "/v1/completions", body)
            assert status == 200, answer
            return str(answer["choices"][0]["text"])

        assert list(pool.map(send, asked)) == expected
    assert model.rows[0] == len(asked)  # tasks shared the steps


def test_a_task_is_trained_on_the_factors_measured_answers_and_leaves_as_a_lora(place: Path) -> None:
    turns = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "red"}]
    (place / "rows.jsonl").write_text("\n".join([json.dumps({"messages": turns})] * 12))
    (place / "ask.jsonl").write_text(json.dumps({"messages": turns[:1]}))
    (place / "tasks.yaml").write_text("new: rows.jsonl\n")
    bank, steps = place / "bank", ("--max-steps", 12, "--core-lr", 0.05)
    told = report("bank", "train", "--tasks", place / "tasks.yaml", "--output", bank, *steps)
    loss = told["tasks"]["new"]["loss"]
    assert loss < 0.2
    report("bank", "export", bank, "new", "--output", place / "new", "--lora")
    measured = report("evaluate", place / "new", "--data", place / "rows.jsonl")
    assert measured["loss"] == pytest.approx(loss, abs=1e-3)
    report("predict", bank, "--data", place / "ask.jsonl", "--task", "new", "--output", place / "said.jsonl")
    said = json.loads((place / "said.jsonl").read_text())["prediction"]
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False)
    assert said == written(merged(place, place / "new"), tokenizer, prompt, 64)[1]
    names = [row["name"] for row in report("bank", "list", bank)["shown"]]
    assert names == ["new", *TASKS]
    report("bank", "verify", bank)
    report("compress", bank, "--add", place / "new", "--replace")
    inspected = report("inspect", place / "new")
    assert {site["expert"] for site in inspected["sites"]} == {None, 0, 1, 2, 3}


@pytest.mark.parametrize("modes", ["task", "task,expert"])
def test_the_plan_foretells_the_bytes_of_a_bank_on_experts(modes: str, place: Path, tmp_path: Path) -> None:
    words = ("--rank", 3, "--modes", modes)
    told = report("compress", place / "loras" / "*", "--output", tmp_path / "bank", *words)
    own = ("--modes", modes) if "expert" in modes else ()
    targets = ("--target-modules", "q_proj", "--target-parameters", ",".join(EXPERTS))
    planned = report("plan", place / "model", "--compress", 3, "--rank", 3, *targets, *own)
    assert planned["bank"]["bytes"] == told["bytes_of_numbers"]
