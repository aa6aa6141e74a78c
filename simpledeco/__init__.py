"""One temperature head for a frozen language model: adaptive decoding by a minimum-sufficient hinge

Modules:

- `simpledeco.loss`: Which temperature does a token need? There is a closed form, and a loss of one line whose minimiser is a quantile of it. After ten minutes on this page you know why `risk` is not a tuning knob but the share of true tokens that you accept to lose, what is wrong with two more obvious losses, and when a trained head cannot know anything that the logits do not say.
- `simpledeco.onpolicy`: A reference answer cannot tell *one right answer, of which the model is unsure* from *many right answers*: both look like a gap. The model's own answers, checked against an answer key, can. At the end of this page you know the one-line change that brings the key into the loss, and why it is still quantile regression.
- `simpledeco.study.hub`: The corpora that a lab would use lie on the Hugging Face hub, each with columns of its own. At the end of this page you know how ten of them become the same kind of example that the pinned packages give, why a repository is named together with a commit, and what to do when one cannot be opened.
- `simpledeco.study.ladder`: Before any head is trained: how much could a temperature for each token gain over one for each prompt, and that over one for all? Where the set of right answers is known, the answer is exact, without sampling. At the end of this page you know the ladder, and how a decoder is placed on it.
- `simpledeco.study.strengths`: A hot decoder is varied and a cold one is right, so two decoders may be compared only where they are equally varied. At the end of this page you know how answers become two numbers for each prompt, and how one rung is compared with another at the same variety, with intervals that know that prompts about one country are one prompt.
- `simpledeco.study.texts`: Decoders are compared by what they write: are the answers to questions right, and are the answers to open prompts varied? At the end of this page you know how prompts are chosen and left out, how answers become numbers with intervals, and how a decoder is compared with a whole frontier of constants."""

__version__ = "1.0.0"
