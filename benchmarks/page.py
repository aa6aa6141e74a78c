"""How the work on a token page grows with its answer: seconds for 100, 1,000 and 10,000 tokens, and how many times those of 100.
Writes benchmarks/page.json. Run: python benchmarks/page.py, which wants Chromium and websocket-client

*Report* is what the model and the head make of an answer, up to what SmolLM2 reads at once; *page* is the file of a report;
*opened* is what the browser takes until the page stands, its script included; *slider* and *key* are one step of the slider
and of an arrow key. A longer answer is a shorter one again and again, the sizes take turns, and a figure is the exponent of
growth, as in growth.py.
"""
import json, os, sys, tempfile, time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT/'tests'))
from browser import Browser
from growth import exponent

from simpledeco.head import TemperatureHead
from simpledeco.look import token_page, token_report
from simpledeco.model import load_model
from simpledeco.study.models import model_folder

SIZES, ROUNDS = (100, 1000, 10_000), 5
WHOLE = 5000 # no report of more tokens is made
OPENED = """(start => (document.body.offsetHeight,
  performance.getEntriesByType('navigation')[0].loadEventEnd + performance.now() - start)/1000)(performance.now())"""
TIMED = '(start => ({}, document.body.offsetHeight, performance.now() - start)/1000)(performance.now())'
SLIDER = "[document.getElementById('sd-scale')].forEach(x => { x.value = %s; x.dispatchEvent(new Event('input')) })"
KEY = "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: '%s', bubbles: true}))"


def seconds_of(work):
    start = time.perf_counter()
    done = work()
    return time.perf_counter() - start, done


def in_browser(browser, address, turn):
    "Seconds until the page is there, of a step of the slider, and of an arrow key"
    browser.open(address)
    opened = browser.js(OPENED)
    browser.js("document.querySelectorAll('.sd-t')[50].focus()")
    steps = SLIDER % (1.5 + .1*turn), KEY % ('ArrowRight', 'ArrowDown')[turn % 2]
    return opened, *(browser.js(TIMED.format(x)) for x in steps)


def once(read, some, browser, folder, size, turn):
    "{what: seconds} for an answer of so many tokens; `some` of them stand for those of a long one"
    took, report = {}, (some*(size//len(some) + 1))[:size]
    if size <= WHOLE: took['report'], report = seconds_of(lambda: read(size))
    took['page'], page = seconds_of(lambda: token_page(dict(head=report), 'Go on', 'SmolLM2', .1))
    (folder/'page.html').write_text(page, encoding='utf-8')
    found = in_browser(browser, f'file://{folder}/page.html', turn)
    return took | dict(zip(('opened', 'slider', 'key'), found)) | dict(bytes=len(page.encode()))


def reader():
    "A function from a number of tokens to the report on an answer of so many"
    model, tokenizer = load_model(model_folder('embedded'))
    head = TemperatureHead.from_pretrained('smollm2-by-token')
    talk = lambda n: [dict(role='user', content='Go on'), dict(role='assistant', content='and so on, '*(n//4 + 1))] # four tokens each
    return lambda n: token_report(model, tokenizer, head, talk(n), scale=2)[:n]


def measure(sizes=SIZES, rounds=ROUNDS):
    "Seconds {what: [rounds, sizes]}; the first round warms up"
    read = reader()
    some = read(min(1000, WHOLE))
    with tempfile.TemporaryDirectory() as folder:
        browser = Browser(Path(folder)/'chromium')
        try: found = [[once(read, some, browser, Path(folder), n, turn) for n in sizes[::-1 if turn % 2 else 1]][::-1 if turn % 2 else 1]
                      for turn in range(rounds + 1)]
        finally: browser.close()
    return {k: np.array([[x[k] for x in turn if k in x] for turn in found[1:]]) for k in found[0][0]}


def figures(sizes, values):
    "What is written of one kind of work: medians, how many times that of the fewest tokens, and the exponent of growth"
    sizes, middles = sizes[:values.shape[1]], np.median(values, 0)
    return dict(sizes=sizes, seconds=middles.tolist(), times=(middles/middles[0]).tolist(), growth=exponent(sizes, values, 1))


if __name__ == '__main__':
    found = measure()
    sizes = found.pop('bytes')[0].tolist()
    results = dict(threads=torch.get_num_threads(), load_before=os.getloadavg()[0], bytes=sizes,
                   **{k: figures(SIZES, v) for k,v in found.items()})
    (Path(__file__).parent/'page.json').write_text(json.dumps(results, indent=1) + '\n')
    print(json.dumps(results, indent=1))
