"""The R1 prompt template that all tasks share: reason inside think tags, answer inside answer tags.

A prompt ends with an opened `<think>`, so a completion is the rest: ` reasoning </think> <answer>ANSWER</answer>`.
This module imports nothing, so that data can be prepared without torch.
"""

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
ANSWER_OPEN = "<answer>"
ANSWER_CLOSE = "</answer>"
R1_TAGS = (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)

# A constant without any field: the embedded tokenizer keeps it as one token.
R1_INSTRUCTION = (
    f"Solve the problem below. Work through it step by step inside {THINK_OPEN} {THINK_CLOSE} tags, "
    f"then write nothing but the final answer inside {ANSWER_OPEN} {ANSWER_CLOSE} tags, "
    f"as in {THINK_OPEN} reasoning {THINK_CLOSE} {ANSWER_OPEN}result{ANSWER_CLOSE}."
)


def format_prompt(question: str) -> str:
    """Puts a question into the template, up to and including the opened think tag.

    Args:
        question: The problem's text; surrounding white space is dropped.

    Returns:
        The prompt as a plain string, to be tokenized as it is (no chat template around it).
    """
    return f"{R1_INSTRUCTION}\nQuestion: {question.strip()}\nResponse: {THINK_OPEN}"


def format_completion(reasoning: str, answer: str) -> str:
    """Writes the completion that a prompt of [`format_prompt`] asks for.

    Args:
        reasoning: Text between the think tags; surrounding white space is dropped.
        answer: The final answer alone, without unit or sentence.

    Returns:
        The completion without an end-of-text token, which is the tokenizer's matter.
    """
    return f" {reasoning.strip()} {THINK_CLOSE} {ANSWER_OPEN}{answer}{ANSWER_CLOSE}"
