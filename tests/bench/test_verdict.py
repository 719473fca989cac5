"""Targets are met, missed or not measured."""

from ssd_core.bench.verdict import judge


def row(variant, median, over, extra=50, workspace=64, ours=True):
    return {"variant": variant, "ours": ours, "status": "timed", "workspace": workspace << 20 if workspace else None,
            "over_floor": over, "extra_bytes": extra << 20, "time": {"median": median}}


def results(*rows, op="linear_cross_entropy", **fields):
    one = {"op": op, "case": "smollm2", "dtype": "float32", "device": "cpu", "frozen": False, "axis": "",
           "tokens": 2048, "hidden": 576, "vocab": 49152, "rows": list(rows), **fields}
    return {"results": [one]}


def lines(result, word):
    return [line for line in judge(result) if word in line]


def test_a_target_is_met_by_the_best_exact_variant():
    exact, slow, filtered = row("cpu", 1, 0.8), row("torch", 2, 1.6), row("cpu, grad_filter=0.01", 1, 0.5)
    found = judge(results(slow, exact, filtered))
    assert any(line.startswith("met") and "<= 0.88" in line and line.endswith("0.80") for line in found)
    assert any(line.startswith("missed") and "filtered" in line and line.endswith("0.50") for line in found)
    assert any(line.startswith("not measured") and "gemma-3-1b" in line for line in found)
    assert not any("cuda" in line for line in found)            # another machine's


def test_a_target_of_some_tokens_is_not_met_by_fewer():
    def head(tokens):
        one = results(row("triton", 1, 1.0, workspace=1024), case="llama-3-8b", dtype="bfloat16", device="cuda",
                      tokens=tokens)
        return lines(one, "llama-3-8b, bfloat16, cuda, at most 1024 MiB")

    assert head(8192) == ["met: linear_cross_entropy, llama-3-8b, bfloat16, cuda, at most 1024 MiB, N = 8192: "
                          "<= 1.08 x floor at N = 8192: 1.00"]
    assert [line.partition(":")[0] for line in head(2048)] == ["not measured"]


def test_a_larger_workspace_does_not_count():
    assert lines(results(row("cpu, 256 MiB", 1, 0.8, workspace=256)), "<= 0.88")[0].startswith("not measured")


def test_seconds_of_a_sampler_on_one_core():
    def sampler(*rows):
        return lines(results(*rows, op="sample", case="qwen3-0.6b", tokens=32), "sample")

    alone = row("cpu, 1 thread", 0.002, 1, workspace=None)
    two = row("cpu, 2 threads", 0.001, 1, workspace=None)
    assert "met: sample, qwen3-0.6b, float32, cpu, 1 thread: <= 2.5 ms at N = 32: 2 ms" in sampler(alone, two)
    assert sampler(row("cpu", 0.001, 1, workspace=None))[0].startswith("not measured")


def test_peers_are_beaten_with_no_more_memory_only():
    peer = row("peer", 2, 2, extra=100, ours=False, workspace=None)
    assert lines(results(row("cpu", 1, 1), peer), "peer's time")[0].startswith("met")
    assert lines(results(row("cpu", 3, 3), peer), "peer's time")[0].startswith("missed")
    assert lines(results(row("cpu", 1, 1, extra=200), peer), "peer's time") == []
    assert lines(results(row("cpu", 1, 1, extra=200), peer), "as little memory")[0].startswith("not measured")


def test_limits_over_a_peer_are_at_the_target_s_workspace():
    eager = row("PyTorch eager", 2, 2, extra=10, ours=False, workspace=None)

    def over(*rows):
        return lines(results(eager, *rows), "<= 0.7")

    assert over(row("cpu", 1.2, 1), row("cpu", 1, 1, workspace=256)) == [
        "met: linear_cross_entropy, smollm2, N = 2048, float32, cpu: 0.6 of PyTorch eager's time, <= 0.7"]
    assert over(row("cpu", 1.5, 1), row("cpu", 1, 1, workspace=256))[0].startswith("missed")
    assert over(row("cpu", 1, 1, workspace=256)) == []


def test_gradient_errors():
    def with_errors(variant, d_input, d_weight, ours=True):
        return {**row(variant, 1, 1, ours=ours), "errors": {"value": 1, "d_input": d_input, "d_weight": d_weight}}

    eager = with_errors("PyTorch eager", 1e-5, 3e-5, ours=False)
    exact, filtered = "ssd-core cpu, 64 MiB", "ssd-core cpu, 64 MiB, grad_filter=0.01"
    assert lines(results(eager, with_errors(exact, 2e-5, 1e-5)), "of eager's")[0].startswith("met")
    assert lines(results(eager, with_errors(exact, 1e-5, 4e-5)), "of eager's")[0].startswith("missed")
    assert lines(results(eager, with_errors(exact, 2e-5, 1e-5), dtype="bfloat16"), "of eager's")[0].startswith("missed")
    assert lines(results(eager, with_errors(filtered, 1e-3, 3.9e-3)), "<= 0.004")[0].startswith("met")
    assert lines(results(eager, with_errors(filtered, 1e-3, 4.1e-3)), "<= 0.004")[0].startswith("missed")


def test_a_broken_workspace_is_named():
    assert lines(results(row("cpu", 1, 1, extra=70)), "takes")[0].endswith("takes 70 MiB, 67 allowed")
    assert lines(results(row("cpu", 1, 1, extra=66)), "takes") == []
    assert lines(results(row("cpu", 1, 1, extra=170), dtype="bfloat16"), "takes") == []     # 108 of accumulator


def test_distillation_over_hard_cross_entropy():
    hard, soft = results(row("cpu", 1.0, 1)), results(row("cpu", 1.04, 1), op="linear_distill")
    both = {"results": hard["results"] + soft["results"]}
    assert lines(both, "of hard") == [
        "met: linear_distill, smollm2, float32: 1.04 of hard cross-entropy's time, <= 1.05"]


def test_two_threads_against_one():
    def scaling(two):
        rows = [row("cpu, 64 MiB, 1 thread", 1, 2), row("cpu, 64 MiB, 2 threads", two, 1)]
        return lines(results(*rows), "on two threads")

    assert scaling(0.5) == [
        "met: linear_cross_entropy, smollm2, float32: cpu, 64 MiB on two threads: 2.00 x as fast as on one, >= 1.8"]
    assert scaling(0.6)[0].startswith("missed")
    assert not lines(results(row("cpu, 64 MiB, 2 threads", 1, 1)), "on two threads")
