"""Jump-forward: tokens that a grammar forces are appended, not sampled one by one.

The matcher splits forced bytes as the model's tokenizer does and keeps back what the next sample may still join; a row
that does not jump is masked to the same tokens. So a request has the same tokens with and without.
"""

from __future__ import annotations

from polyradix.schedule.plan import Plan
from polyradix.schedule.request import Request


def forced(req: Request, room: int) -> list[int]:
    """What must come next: `room` tokens at most, none of them a stop token, which is left to be sampled."""
    assert req.matcher is not None
    tokens = req.matcher.forced()[: max(0, room)]
    return tokens[: next((i for i, token in enumerate(tokens) if token in req.stops), len(tokens))]


def begin(req: Request) -> int:
    """Put what is forced from the start, but for its last token, behind the prompt of a new request. How many."""
    if not req.jumps or req.matcher is None:
        return 0
    req.ahead = forced(req, req.limit - len(req.prompt))[:-1]
    for token in req.ahead:
        req.matcher.accept(token)
    req.outputs += req.ahead
    req.feed(req.tokens())
    req.jumped = bool(req.ahead)
    return len(req.ahead)


def expected(plan: Plan) -> bool:
    """Whether most rows of a plan jumped at their last token and so may at its sample. A plan made before that is here
    computes no more of them than one token, which a chunk would compute too."""
    return plan.masked and 2 * sum(req.jumped for req in plan.rows) > len(plan.rows)
