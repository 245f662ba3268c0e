"""Loss scaling for fp16."""


class LossScale:
    """A factor for losses in fp16, so that small gradients do not vanish.

    It is halved when a gradient overflows, which costs that step, and doubled after
    :attr:`PATIENCE` steps without (Micikevicius et al. 2018).

    Attributes:
        value: the factor; 1 in other precisions.
        good_steps: since the last overflow.
    """

    PATIENCE = 1000

    def __init__(self, precision: str) -> None:
        self._is_dynamic = precision == "fp16"
        self.value = 2.0**14 if self._is_dynamic else 1.0
        self.good_steps = 0

    def after(self, *, overflowed: bool) -> None:
        """Adapt the factor to a step."""
        if not self._is_dynamic:
            return
        if overflowed:
            self.good_steps = 0
            self.value = max(1.0, self.value / 2)
            return
        self.good_steps += 1
        if self.good_steps % self.PATIENCE == 0:
            self.value *= 2
