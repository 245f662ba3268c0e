"""Loss scaling of fp16."""


class LossScale:
    """By what losses of fp16 are multiplied, so that small gradients do not vanish (Micikevicius et al. 2018).

    Halved when a gradient overflows, which costs that step, and doubled after :attr:`PATIENCE` steps without.
    """

    PATIENCE = 1000

    def __init__(self, precision: str) -> None:
        self.is_dynamic = precision == "fp16"
        self.value, self.good_steps = 2.0**14 if self.is_dynamic else 1.0, 0

    def after(self, *, overflowed: bool) -> None:
        """Take note of a step."""
        if not self.is_dynamic:
            return
        self.good_steps = 0 if overflowed else self.good_steps + 1
        if overflowed:
            self.value = max(1.0, self.value / 2)
        elif self.good_steps % self.PATIENCE == 0:
            self.value *= 2
