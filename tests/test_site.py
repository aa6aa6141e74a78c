"The site that `make docs` has built: pages in a browser, every link, search, and nothing from another host"
import csv, functools, html, itertools, json, re, shutil, subprocess, threading, time
from collections import defaultdict
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urldefrag, urljoin, urlsplit
from urllib.request import urlopen

import pytest
from conftest import ROOT

pytest.importorskip('mkdocs', reason='the site is not tested: `make docs` installs what builds it, builds it and tests it')
SITE = ROOT/'build/site'
if not (SITE/'index.html').exists(): pytest.skip('there is no site: `make docs` builds and tests it', allow_module_level=True)
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
PAGES = sorted(p.relative_to(SITE).as_posix().removesuffix('index.html') for p in SITE.rglob('*.html') if p.name != '404.html')
LOADED = {('script', 'src'), ('img', 'src'), ('iframe', 'src'), ('source', 'src'), ('img', 'srcset'), ('link', 'href')}


class Links(HTMLParser):
    "What a page refers to: (tag, attribute, address), and the names that its addresses can end in"
    def __init__(self, text):
        super().__init__()
        self.found, self.names = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if ('rel', 'canonical') not in attrs: # what the page itself is called, where it is published
            self.found += [(tag, k, v) for k,v in attrs if k in ('href', 'src', 'srcset') and v]
        self.names |= {v for k,v in attrs if k in ('id', 'name')}


@functools.cache
def links(page): return Links((SITE/page/'index.html').read_text(encoding='utf-8'))


def test_every_notebook_and_module_has_a_page():
    for p in (ROOT/'nbs').rglob('*.ipynb'):
        if p.stem != 'index' and '.ipynb_checkpoints' not in p.parts:
            assert f'{p.relative_to(ROOT).with_suffix("").as_posix()}/' in PAGES
    for p in (ROOT/'simpledeco').rglob('*.py'):
        if p.stem[0] != '_': assert f'reference/{".".join(p.relative_to(ROOT).with_suffix("").parts)}/' in PAGES


def test_links_and_anchors_resolve():
    seen, broken = 0, []
    for page in PAGES:
        for _,_,address in links(page).found:
            if urlsplit(address).scheme: continue
            path, anchor = urldefrag(urljoin(f'/{page}', address))
            target = SITE/unquote(path.split('?')[0]).lstrip('/')
            seen += 1
            if target.is_dir(): target /= 'index.html'
            there = target.exists()
            if there and anchor and target.suffix == '.html':
                names = links(target.parent.relative_to(SITE).as_posix()).names
                there = unquote(anchor) in names
            if not there: broken.append(f'{page}: {address}')
    assert not broken and seen > 1000


def test_nothing_is_loaded_from_another_host():
    other = re.compile(r'(?:https?:)?//')
    for page in PAGES:
        assert not [x for x in links(page).found if x[:2] in LOADED and other.match(x[2])], page
    for p in SITE.rglob('*.css'):
        assert not re.findall(r'(?:url\(|@import )\s*["\']?(?:https?:)?//[^)]*', p.read_text(encoding='utf-8')), p.name


def test_formulas_and_tables_are_drawn_and_directives_are_gone():
    text = (SITE/'nbs/01_loss/index.html').read_text(encoding='utf-8')
    assert text.count('<math') > 50 and 'arithmatex' not in text and '#| export' not in text
    for page in PAGES:
        prose = re.sub(r'<(pre|code|script)\b.*?</\1>', '', (SITE/page/'index.html').read_text(encoding='utf-8'), flags=re.S)
        assert not re.search(r'\$[^$<>\n]+\$|^\| ?-+', prose, re.M), f'{page}: a formula or a table is left as it was typed'


def test_parameters_have_their_comments():
    text = (SITE/'reference/simpledeco.loss/index.html').read_text(encoding='utf-8')
    assert 'the share of true tokens one accepts to lose' in text.split('id="simpledeco.loss.minimum_sufficient_hinge"')[1]
    assert 'simpledeco.table.TokenTable.take' in links('reference/simpledeco.table/').names, 'a patch is no method'


def test_figures_name_the_stage_that_made_them():
    text = re.sub('<[^>]+>', '', (SITE/'figures/index.html').read_text(encoding='utf-8'))
    assert re.search(r'results/embedded/auroc.csv, made by the stage evaluate with the commit [0-9a-f]{7,} of \d{4}-\d\d-\d\d', text)
    assert len(re.findall('made by the stage', text)) >= len(list((ROOT/'paper/figures').rglob('*.pdf')))


def test_the_search_index_finds_a_word_on_its_page():
    docs = json.loads((SITE/'search/search_index.json').read_text(encoding='utf-8'))['docs']
    where = {d['location'].partition('#')[0] for d in docs if 'nucleus' in d['text']}
    assert 'nbs/22_logits/' in where and 'nbs/21_files/' not in where
    assert {d['location'].partition('#')[0] for d in docs} == set(PAGES)


# in the browser

class Browser:
    "A tab of headless Chromium, spoken to by its DevTools protocol"
    def __init__(self, folder):
        websocket = pytest.importorskip('websocket', reason='websocket-client is not installed')
        command = [CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--remote-debugging-port=0',
                   '--remote-allow-origins=*', f'--user-data-dir={folder}', 'about:blank']
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = folder/'DevToolsActivePort'
        self.until(lambda: port.exists() and port.read_text().count('\n'), 'Chromium did not start')
        with urlopen(f'http://127.0.0.1:{port.read_text().splitlines()[0]}/json') as f:
            tab = next(t for t in json.load(f) if t['type'] == 'page')
        self.socket = websocket.create_connection(tab['webSocketDebuggerUrl'], timeout=60)
        self.numbers, self.events = itertools.count(1), []
        for domain in ('Page', 'Runtime', 'Log', 'Network'): self.send(f'{domain}.enable')

    def until(self, done, otherwise, seconds=60):
        end = time.monotonic() + seconds
        while not (found := done()):
            assert time.monotonic() < end, otherwise
            time.sleep(.05)
        return found

    def receive(self):
        message = json.loads(self.socket.recv())
        if 'method' in message: self.events.append(message)
        return message

    def send(self, method, **params):
        number = next(self.numbers)
        self.socket.send(json.dumps(dict(id=number, method=method, params=params)))
        while (message := self.receive()).get('id') != number: pass
        assert 'error' not in message, message
        return message['result']

    def open(self, address):
        self.events.clear()
        self.send('Page.navigate', url=address)
        while not any(e['method'] == 'Page.loadEventFired' for e in self.events): self.receive()
        self.run('new Promise(done => requestAnimationFrame(() => setTimeout(done)))') # what scripts do after that

    def run(self, code):
        found = self.send('Runtime.evaluate', expression=code, awaitPromise=True, returnByValue=True)
        assert 'exceptionDetails' not in found, found
        return found['result'].get('value')

    def of(self, method): return [e['params'] for e in self.events if e['method'] == method]

    def complaints(self):
        said = [e['exceptionDetails'] for e in self.of('Runtime.exceptionThrown')]
        said += [e['args'] for e in self.of('Runtime.consoleAPICalled') if e['type'] in ('error', 'assert')]
        said += [e['entry']['text'] for e in self.of('Log.entryAdded') if e['entry']['level'] == 'error']
        said += [e['errorText'] for e in self.of('Network.loadingFailed') if not e.get('canceled')]
        return said + [e['response']['url'] for e in self.of('Network.responseReceived') if e['response']['status'] >= 400]

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope='module')
def address():
    server = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()
    server.server_close()


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    if CHROMIUM is None: pytest.skip('there is no Chromium')
    browser = Browser(tmp_path_factory.mktemp('chromium'))
    yield browser
    browser.close()


NARROW = '[...document.querySelectorAll("math")].filter(x => !x.getBoundingClientRect().width).map(x => x.textContent)'


def test_pages_open_without_an_error(browser, address):
    "Some, since each reads the whole search index, and those that are like no other"
    wrong = defaultdict(list)
    for page in sorted({'', 'decoders/', 'figures/', 'nbs/00_tour/', 'nbs/01_loss/', *PAGES[::8]}):
        browser.open(address + page)
        wrong[page] += browser.complaints()
        asked = {e['request']['url'] for e in browser.of('Network.requestWillBeSent')}
        wrong[page] += [u for u in asked if not u.startswith((address, 'data:', 'blob:'))]
        wrong[page] += browser.run('[...document.images].filter(x => x.complete && !x.naturalWidth).map(x => x.src)')
        wrong[page] += browser.run(NARROW)
        if not browser.run('document.querySelector("h1")?.getBoundingClientRect().height'): wrong[page].append('no title')
    assert not {k: v for k,v in wrong.items() if v}


def test_no_page_is_wider_than_a_phone(browser, address):
    browser.send('Emulation.setDeviceMetricsOverride', width=390, height=844, deviceScaleFactor=1, mobile=True)
    wide = {}
    for page in ('', 'decoders/', 'figures/', 'nbs/01_loss/', 'nbs/12_decoders/', 'nbs/32_look/', 'reference/simpledeco.head/'):
        browser.open(address + page)
        if (width := browser.run('document.documentElement.scrollWidth')) > 390: wide[page] = width
    browser.send('Emulation.clearDeviceMetricsOverride')
    assert not wide


def test_dark_mode_toggles_and_stays(browser, address):
    background = 'getComputedStyle(document.body).backgroundColor'
    browser.send('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value='light')])
    browser.open(address)
    light = browser.run(background)
    browser.run('document.querySelector("[data-md-component=palette] label:not([hidden])").click()')
    dark = browser.until(lambda: (b := browser.run(background)) != light and b, 'the colours stay')
    assert browser.run('document.body.dataset.mdColorScheme') == 'slate'
    browser.open(f'{address}nbs/01_loss/')
    assert browser.run(background) == dark
    browser.run('document.querySelector("[data-md-component=palette] label:not([hidden])").click()')
    browser.until(lambda: browser.run(background) == light, 'the dark does not end')


def test_search_finds_in_the_browser(browser, address):
    browser.open(address)
    browser.run('''document.querySelector("[data-md-toggle=search]").click()
        const box = document.querySelector("[data-md-component=search-query]")
        box.focus(); box.value = "quantile"; box.dispatchEvent(new Event("input", {bubbles: true}))
        box.dispatchEvent(new KeyboardEvent("keyup", {bubbles: true}))''')
    found = browser.until(lambda: browser.run('[...document.querySelectorAll(".md-search-result__link")].map(x => x.href)'),
                          'nothing is found')
    assert any('/nbs/01_loss/' in x for x in found)


def test_every_table_of_the_leaderboard_is_sorted_by_a_heading(browser, address):
    browser.open(f'{address}decoders/')
    tables = browser.run('[...document.querySelectorAll(".sortable")].map(t => [...t.tHead.rows[0].cells].map(x => x.textContent))')
    assert len(tables) == 10 and all(heads[0] == 'decoder' for heads in tables)
    for k,heads in enumerate(tables):
        table = f'document.querySelectorAll(".sortable")[{k}]'
        for n in range(1, len(heads)):
            if heads[n] == 'kind': continue
            for largest_first in (True, False):
                browser.run(f'{table}.querySelectorAll("th button")[{n}].click()')
                values = browser.run(f'[...{table}.tBodies[0].rows].map(r => r.cells[{n}].dataset.value)')
                numbers = [float(v) for v in values if v]
                assert len(numbers) > 3 and numbers == sorted(numbers, reverse=largest_first), (k, heads[n])
                assert values[len(numbers):] == ['']*(len(values) - len(numbers)), 'rows without a value stay last'


def test_the_leaderboard_has_every_decoder_with_its_interval_and_commit():
    text = (SITE/'decoders/index.html').read_text(encoding='utf-8')
    parts = re.findall(r'<h2 id="[^"]*">(.+?)<a(.+?)(?=<h2|</article>)', text, re.S)
    made = r'made with the commit <code>([0-9a-f]{7,})</code> of [0-9-]{10}\..*?<tbody>(.+?)</tbody>'
    shown = [(head, found[1], found[2]) for head,part in parts if (found := re.search(made, part, re.S))]
    assert len(shown) == 10
    rows = {head: re.findall(r'<tr><td data-value="(.*?)">', body) for head,_,body in shown}
    for profile,column,heading in (('full', 'method', 'Questions and open prompts: SmolLM2-135M'),
                                   ('gemma', 'decoder', 'A fact inside fiction: Gemma-3-270M, pretrained only')):
        file = ROOT/'results'/profile/('frontier.csv' if column == 'method' else 'rungs_gains.csv')
        with file.open(encoding='utf-8') as f: known = {r[column] for r in csv.DictReader(f)}
        assert known == {html.unescape(x) for x in rows[heading]}
    r = next(r for r in csv.DictReader((ROOT/'results/full/frontier.csv').open(encoding='utf-8')) if r['method'] == 'judged, left out')
    excess = {k: float(v) for k,v in r.items() if k.startswith('excess')}
    said = '{excess:+.3f} <small>[{excess_lo:+.3f}, {excess_hi:+.3f}]</small>'.format(**excess)
    assert said in shown[0][2]
