"""pass@1 on problems in HumanEval's format."""

from .grade import Evaluation, grade
from .passk import pass_at_k, wilson_interval
from .problems import Problem, load_problems, problem_prompt, problem_stop_strings, program
from .sandbox import Outcome, run_program

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
