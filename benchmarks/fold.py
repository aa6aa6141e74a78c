"""Decode speed with a row of the output matrix over static min-p, in transformers. Writes benchmarks/fold.json. Run: python benchmarks/fold.py

The row and the static temperature take turns step by step in one model, R S S R, and the ratio is the median of the pairs of neighbours, with a 95% interval that resamples
them, as in decode.py. Both steps run the folded model: a row among 49,153 is no work that could be measured.
"""
import json, os, tempfile, time
from pathlib import Path

import numpy as np
import torch, transformers
from run import ROOT, compared
from transformers import LogitsProcessorList, TemperatureLogitsWarper

from simpledeco.fold import fold, RowTemperature
from simpledeco.head import TemperatureHead
from simpledeco.model import fingerprint, load_model

MODEL, T, SKIP, STEPS = ROOT/'models/embedded', .7, 4, 60 # the static temperature; steps before the first that counts, and how many do: multiples of four
CALLS = {1: 24, 16: 16, 64: 8} # of `generate`, by the size of the batch


class Turns:
    "A processor that is the row and the static temperature in turn, and keeps the clock"
    def __init__(self, settings): self.row, self.static, self.clock = RowTemperature(**settings), TemperatureLogitsWarper(T), []
    def __call__(self, ids, scores):
        self.clock.append(time.perf_counter())
        return (self.row if len(self.clock) % 4 in (0, 1) else self.static)(ids, scores)


def speed(model, tokenizer, batch, calls):
    "Compare neighbouring steps; the first call warms up"
    ids, steps = tokenizer(['The capital of France is']*batch, return_tensors='pt').input_ids, []
    for _ in range(calls + 1):
        turns = Turns(model.generation_config.simpledeco)
        length = SKIP + STEPS + 1
        model.generate(ids, max_new_tokens=length, min_new_tokens=length, pad_token_id=0, logits_processor=LogitsProcessorList([turns]))
        steps.append(np.diff(turns.clock)[SKIP:SKIP + STEPS])
    steps = np.stack(steps[1:]).reshape(-1, 4)
    pairs = np.concatenate([steps[:, [1, 0]], steps[:, [2, 3]]]) # static, row
    static, row = np.median(pairs, 0)
    return compared(pairs)[0] | dict(row_milliseconds=1000*row, static_milliseconds=1000*static, row_tokens_per_second=batch/row)


if __name__ == '__main__':
    results = dict(threads=torch.get_num_threads(), cores=os.cpu_count(), load_before=os.getloadavg()[0], transformers_version=transformers.__version__, steps=STEPS)
    with tempfile.TemporaryDirectory() as tmp:
        model, tokenizer = load_model(MODEL)
        head = TemperatureHead(model.config.hidden_size, width=0, reads='hidden', base_model=fingerprint(model)).eval()
        head.save_pretrained(Path(tmp)/'head')
        folded, _ = load_model(fold(Path(tmp)/'head', MODEL, Path(tmp)/'folded'))
        for batch,calls in CALLS.items():
            results[f'batch {batch}'] = speed(folded, tokenizer, batch, calls)
            print(batch, {k: round(v, 3) for k,v in results[f'batch {batch}'].items()}, flush=True)
            (Path(__file__).parent/'fold.json').write_text(json.dumps(results, indent=1) + '\n')
