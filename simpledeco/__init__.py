"""One temperature head for a frozen language model: adaptive decoding by a minimum-sufficient hinge

Modules:

- `simpledeco.loss`: Which temperature does a token need? There is a closed form, and a loss of one line whose minimiser is a quantile of it. After ten minutes on this page you know why `risk` is not a tuning knob but the share of true tokens that you accept to lose, what is wrong with two more obvious losses, and when a trained head cannot know anything that the logits do not say."""

__version__ = "0.0.1"
