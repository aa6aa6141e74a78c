"lm-eval's model type"
import copy

import pytest, torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from conftest import ROOT

from simpledeco.decode import min_p_filter
from simpledeco.harness import SimpleDecoLM
from simpledeco.head import TemperatureHead
from simpledeco.model import fingerprint, load_model

MODEL = str(ROOT/'models/smoke')


@pytest.fixture(scope='module')
def lms(tmp_path_factory):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp('harness')/'head'
    TemperatureHead(32, base_model=fingerprint(load_model(MODEL)[0])).save_pretrained(folder)
    kw = dict(device='cpu', dtype='float32', batch_size=8)
    return HFLM(MODEL, **kw), SimpleDecoLM(MODEL, str(folder), scale='3', **kw)


def ask(kind, *arguments): return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_log_likelihoods_are_those_of_the_model(lms):
    requests = [ask('loglikelihood', 'What is', ' the capital'),
                ask('loglikelihood', 'One', ' two three')]
    base, ours = (lm.loglikelihood(requests, disable_tqdm=True) for lm in lms)
    assert ours == base


def test_greedy_requests_are_those_of_the_model(lms):
    requests = [ask('generate_until', text, dict(until=['\n'], max_gen_toks=8))
                for text in ('What is the', 'Once upon a time there', 'One')]
    base, ours = (lm.generate_until(requests, disable_tqdm=True) for lm in lms)
    assert ours == base


def test_sampled_requests_are_batched_and_stay_among_the_candidates(lms):
    "Every sampled token survives min-p at scale times temperature times the head's temperature"
    base, ours = lms
    prompt, temperature, texts = 'What is the', 1.5, []
    generate = ours.model.generate
    def spy(**kw): out = generate(**kw); texts.append(out); return out
    ours.model.generate = spy
    try:
        ours.generate_until([ask('generate_until', prompt,
                                 dict(until=['\n'], max_gen_toks=6, do_sample=True,
                                      temperature=temperature)) for _ in range(16)], disable_tqdm=True)
    finally: del ours.model.generate
    assert len(texts) == 2 and all(len(t) == 8 for t in texts)
    for out in texts:
        start = len(ours.tok_encode(prompt))
        with torch.no_grad(): z = ours.model(out).logits[:, start-1:-1]
        T = 3*temperature*ours.head.temperature(ours.head.live_inputs(z, z)).detach()
        kept = torch.isfinite(min_p_filter(z/T[..., None],
                                           .1*(1 - 1e-4))).gather(-1, out[:, start:, None])[..., 0]
        lived = (out[:, start:] != ours.tokenizer.pad_token_id).cummin(1).values
        assert kept[lived].all() and (out[:, start:][lived] != z.argmax(-1)[lived]).any()


def test_a_task_with_another_min_p_is_refused(lms):
    with pytest.raises(ValueError, match='decoding uses 0.3'):
        lms[1].generate_until([ask('generate_until', 'One',
                                   dict(do_sample=True, temperature=1.0, min_p=.3, max_gen_toks=2))],
                              disable_tqdm=True)


def test_settings_of_the_model_are_not_in_force_and_those_of_the_task_are(lms):
    """With a top-k of 1 in the model's own settings every text would be the same; with one in the
    task every text is"""
    ours, own = lms[1], copy.deepcopy(lms[1].model.generation_config)
    ours.model.generation_config.update(top_k=1, temperature=.01, repetition_penalty=3.)
    def texts(**kw):
        requests = [ask('generate_until', 'What is the',
                        dict(until=['\n'], max_gen_toks=6, do_sample=True, temperature=1.5, **kw))
                    for _ in range(8)]
        return set(ours.generate_until(requests, disable_tqdm=True))
    try: assert len(texts()) > 1 and len(texts(top_k=1)) == 1
    finally: ours.model.generation_config = own
