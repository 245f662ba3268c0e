"""Loss scaling of fp16."""


class LossScale:
    """By what losses of fp16 are multiplied, so that small gradients do not vanish (Micikevicius et al. 2018).

    Halved when a gradient overflows, which costs that update, and doubled after :attr:`PATIENCE` updates without.
    """

    PATIENCE = 1000

    def __init__(self, precision: str) -> None:
        self.is_dynamic = precision == "fp16"
        self.value, self.good_updates = 2.0**14 if self.is_dynamic else 1.0, 0

    def after(self, *, overflowed: bool) -> None:
        """Take note of an update."""
        if not self.is_dynamic:
            return
        self.good_updates = 0 if overflowed else self.good_updates + 1
        if overflowed:
            self.value = max(1.0, self.value / 2)
        elif self.good_updates % self.PATIENCE == 0:
            self.value *= 2
