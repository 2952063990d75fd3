"""`make demo`: from the sample papers to an exported model, in a few minutes on two cores.

Every stage is a command that a user would type; this file only types them in order and checks what came out.
"""

import shutil
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

from data_tools.corpus import Corpus
from launch.typed import RANKS, console, on_ranks, run, stage
from pmc_llama.checkpoint import list_checkpoints, read_manifest
from pmc_llama.data import heldout_batches
from pmc_llama.metrics import read_metrics

OUTPUT = Path("demo-output")
RECIPE = "recipes/demo.yaml"
MORE_STEPS = 12
# Relative. The export computes with the trainer's bf16 weights, so only the order of sums may differ; a dozen
# more steps change the loss by far more.
TOLERANCE = 1e-4


def main() -> None:
    """Run every stage and say what was made."""
    begin = time.monotonic()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    stage("1/5  papers to token files")
    run(
        *("pmc-data", "build", "--input", "sample/s2orc", "sample/jats", "--workers", "2"),
        *("--tokenizer", "sample/tokenizer.model", "--heldout", "0.1", "--output", f"{OUTPUT}/corpus"),
        *("--max_bad", "0.1"),  # two of the sample's records are damaged, to be counted
    )
    stage(
        f"2/5  the same recipe under ZeRO-3 and under FSDP2, on {RANKS} {'rank' if RANKS == 1 else 'ranks'}"
    )
    run("pmc-llama", "compare", RECIPE, "--ranks", str(RANKS), "--output", f"{OUTPUT}/compare")
    stage("3/5  the ZeRO-3 checkpoint goes on under FSDP2")
    trained_on = go_on_under_fsdp()
    stage("4/5  export to Hugging Face format")
    run("pmc-llama", "export", f"{OUTPUT}/continued", f"{OUTPUT}/model")
    stage("5/5  the export, opened with transformers, on the held-out papers")
    reloaded = heldout_loss_of_export()
    show_result(trained_on, reloaded, time.monotonic() - begin)


def go_on_under_fsdp() -> float:
    """Train a few more steps from the last ZeRO-3 checkpoint; the trainer's last held-out loss."""
    source = list_checkpoints(OUTPUT / "compare" / "deepspeed" / "checkpoints")[-1]
    steps = int(source.name.removeprefix("step-")) + MORE_STEPS
    train = ("train", RECIPE, "--backend", "fsdp", "--output", f"{OUTPUT}/continued")
    run(*on_ranks(*train, "--resume", str(source), "--schedule.steps", str(steps)))
    loss: float = read_metrics(OUTPUT / "continued" / "metrics.jsonl")[-1]["heldout_loss"]
    return loss


def heldout_loss_of_export() -> float:
    """Mean held-out loss, in nats a token, of the exported model as transformers computes it.

    On the device and the sequences on which the trainer computed it.
    """
    logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = LlamaForCausalLM.from_pretrained(OUTPUT / "model", dtype=torch.bfloat16).eval().to(device)
    exported = list_checkpoints(OUTPUT / "continued" / "checkpoints")[-1]
    recipe = read_manifest(exported).recipe
    heldout = Corpus.open(OUTPUT / "corpus").split("heldout")
    summed, targets = 0.0, 0
    with torch.no_grad():
        for batch in heldout_batches(
            heldout,
            sequence_length=recipe["data"]["sequence_length"],
            micro_size=recipe["batch"]["micro_size"],
            rank=0,
            world_size=1,
            max_sequences=recipe["evaluation"]["max_sequences"],
        ):
            labels = batch.labels.to(device)
            logits = model(batch.inputs.to(device)).logits.flatten(0, 1).float()
            summed += float(functional.cross_entropy(logits, labels.flatten(), reduction="sum"))
            targets += int((labels >= 0).sum())
    return summed / targets


def show_result(trained_on: float, reloaded: float, seconds: float) -> None:
    """The last screen; ends with status 1 when the export does not score as the trainer did."""
    difference = abs(reloaded - trained_on)
    console.rule(f"[bold]made in {seconds:.0f} s")
    console.print(f"token files   {OUTPUT}/corpus")
    console.print(f"comparison    {OUTPUT}/compare/report.md, picture {OUTPUT}/compare/comparison.png")
    console.print(f"run           {OUTPUT}/continued, its checkpoints, metrics.jsonl and TensorBoard files")
    console.print(f"model         {OUTPUT}/model, for LlamaForCausalLM and AutoTokenizer\n")
    console.print(f"held-out loss by the trainer    {trained_on:.6f} nats a token")
    console.print(f"held-out loss by the export     {reloaded:.6f} nats a token, difference {difference:.1e}")
    tokenizer = AutoTokenizer.from_pretrained(OUTPUT / "model")
    console.print(
        f"AutoTokenizer cuts 'myocardial infarction' into {tokenizer.tokenize('myocardial infarction')}"
    )
    if not difference <= TOLERANCE * trained_on:
        console.print("[red]the export does not score as the trainer did")
        sys.exit(1)
    console.print("\nTry next, in .venv/bin:")
    console.print(f"  pmc-data inspect {OUTPUT}/corpus --document 3")
    console.print(f"  tensorboard --logdir {OUTPUT}/continued")
    console.print(f"  pmc-llama checkpoint list {OUTPUT}/compare/deepspeed")
    console.print(
        f"  pmc-llama train {RECIPE} --backend fsdp --output runs/mine --optimizer.learning_rate 1e-3"
    )


if __name__ == "__main__":
    main()
