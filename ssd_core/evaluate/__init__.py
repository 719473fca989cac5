"""pass@1 on problems in HumanEval's format."""

from ssd_core.evaluate.grade import Evaluation, grade
from ssd_core.evaluate.passk import pass_at_k, wilson_interval
from ssd_core.evaluate.problems import Problem, load_problems, problem_prompt, problem_stop_strings, program
from ssd_core.evaluate.sandbox import Outcome, run_program

__all__ = [
    "Evaluation",
    "Outcome",
    "Problem",
    "grade",
    "load_problems",
    "pass_at_k",
    "problem_prompt",
    "problem_stop_strings",
    "program",
    "run_program",
    "wilson_interval",
]
