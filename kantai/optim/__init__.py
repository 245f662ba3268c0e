"""How weights move: AdamW, Muon, and the learning rate schedule."""
