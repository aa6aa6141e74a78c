"The site that `make docs` has built: pages in a browser, every link, search, and nothing from another host"
import csv, functools, itertools, json, re, shutil, subprocess, threading, time
from collections import Counter, defaultdict
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


def test_lists_begin_with_their_own_numbers():
    "The expectations of the plan are numbered through, and the paper counts them"
    cells = json.loads((ROOT/'nbs/54_plan.ipynb').read_text(encoding='utf-8'))['cells']
    said = [int(n) for c in cells if c['cell_type'] == 'markdown' for n in re.findall(r'^(\d+)\. ', ''.join(c['source']), re.M)]
    lists = re.findall(r'<ol(?: start="(\d+)")?>(.*?)</ol>', (SITE/'nbs/54_plan/index.html').read_text(encoding='utf-8'), re.S)
    assert max(said) > 60 and [int(start or 1) + i for start,items in lists for i in range(items.count('<li>'))] == said


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
    assert '<mi>log</mi><mspace' in text and not re.search(r'<mi>log</mi><m(i|sub|frac)\b', text), 'log x is written as logx'
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


def test_the_paper_is_there_where_it_has_been_made():
    made = ROOT/'paper/main.pdf'
    known = 'paper/main.pdf' in [urljoin('/', address).lstrip('/') for _,_,address in links('').found]
    assert known == (SITE/'paper/main.pdf').exists() == made.exists()
    if known: assert (SITE/'paper/main.pdf').read_bytes()[:5] == b'%PDF-' and made.read_bytes() == (SITE/'paper/main.pdf').read_bytes()


def test_the_token_page_is_shown_on_the_front_page_and_on_its_own():
    picture = (SITE/'token-page.png').read_bytes()
    assert picture == (ROOT/'docs/token-page.png').read_bytes() and picture[:4] == b'\x89PNG' and len(picture) < 100_000
    for page,address in (('', 'token-page.png'), ('nbs/32_look/', '../../token-page.png')):
        assert ('img', 'src', address) in links(page).found, page


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
        self.socket = websocket.create_connection(tab['webSocketDebuggerUrl'], timeout=300)
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
    wrong = defaultdict(list)
    for page in PAGES:
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
    assert len(tables) == len(boards()) and all(heads[0] == 'decoder' for heads in tables)
    for k,heads in enumerate(tables):
        table = f'document.querySelectorAll(".sortable")[{k}]'
        for n in range(1, len(heads)):
            if heads[n] == 'kind': continue
            for largest_first in (True, False):
                browser.run(f'{table}.querySelectorAll("th button")[{n}].click()')
                values = browser.run(f'[...{table}.tBodies[0].rows].map(r => r.cells[{n}].dataset.value)')
                numbers = [float(v) for v in values if v]
                assert numbers and numbers == sorted(numbers, reverse=largest_first), (k, heads[n])
                assert values[len(numbers):] == ['']*(len(values) - len(numbers)), 'rows without a value stay last'


# the leaderboard, against the files of results

MADE = r'([\w/.-]+), made with the commit [0-9a-f]{7,} of \d{4}-\d\d-\d\d\.'

class Board(HTMLParser):
    "The tables of the leaderboard: (heading, file of results, {decoder: {column: what is shown}})"
    def __init__(self, text):
        super().__init__()
        self.tables, self.file, self.said = [], None, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag in ('h2', 'p', 'td', 'th'): self.said = []
        if tag == 'tr': self.row = []
        if tag == 'table': self.rows = []

    def handle_data(self, data): self.said.append(data)

    def handle_endtag(self, tag):
        said = ''.join(self.said).strip()
        if tag == 'h2': self.heading, self.file = said.removesuffix('¶'), None
        elif tag == 'p' and (made := re.fullmatch(MADE, said)): self.file = made[1]
        elif tag in ('td', 'th'): self.row.append(said)
        elif tag == 'tr': self.rows.append(self.row)
        elif tag == 'table':
            heads, *rows = self.rows
            self.tables.append((self.heading, self.file, {r[0]: dict(zip(heads, r, strict=True)) for r in rows}))


@functools.cache
def boards(): return Board((SITE/'decoders/index.html').read_text(encoding='utf-8').split('<article')[1].split('</article>')[0]).tables


def rows(file):
    with (ROOT/file).open(encoding='utf-8') as f: return list(csv.DictReader(f))


def with_interval(mean, lo, hi, form='.3f'):
    "What a cell shows of a number that may lack an interval, or be lacking"
    shown = [format(float(x), form) for x in (mean, lo, hi) if x not in ('', None)]
    return f'{shown[0]} [{shown[1]}, {shown[2]}]' if len(shown) == 3 else ''.join(shown)


def of_board(file): return [table for _,found,table in boards() if found == file]


GAINS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT/'results').glob('*/rungs_gains.csv'))
CONSTANT = 'static, min-p'


def test_whatever_ranks_decoders_is_on_the_leaderboard():
    "Every committed file of results of these kinds, and each of its tasks, under headings of their own, each with its commit"
    committed = subprocess.check_output(['git', 'ls-files', 'results', 'benchmarks'], cwd=ROOT, text=True).split()
    kinds = ('frontier.csv', 'ladder.json', 'evaluate.json', 'controls.json', 'benchmarks.json', 'public.json', 'public-gemma.json')
    tasks = {file: len({r['task'] for r in rows(file)}) for file in GAINS if file in committed}
    wanted = tasks | {file: 1 for file in committed if file.split('/')[-1] in kinds}
    assert Counter(file for _,file,_ in boards()) == wanted and len({heading for heading,*_ in boards()}) == sum(wanted.values()) >= 19


@pytest.mark.parametrize('file', GAINS)
def test_every_gain_on_the_ladder_is_shown_with_its_interval(file):
    tasks, seen = list(dict.fromkeys(r['task'] for r in rows(file))), 0
    for task,table in zip(tasks, of_board(file), strict=True):
        found = [r for r in rows(file) if r['task'] == task]
        assert set(table) == {r['decoder'] for r in found if r['rival'] == CONSTANT} | {CONSTANT}
        for r in found:
            said = with_interval(r['gain'], r['lo'], r['hi'], '+.3f')
            if r['rival'] == CONSTANT:
                assert table[r['decoder']].get(f'above a constant, {r["at"]}', '') == said
                assert table[r['decoder']].get(f'right answers, {r["at"]}', '') == with_interval(r['good'], '', '')
            if r['decoder'] == 'by token': assert table[r['rival']].get(f'by token above it, {r["at"]}', '') == said
            seen += said != ''
    assert seen > 5


@pytest.mark.parametrize('file', GAINS)
def test_the_constant_is_as_often_right_as_its_own_answers_are(file):
    "From the answers themselves, not from how far others lie above it"
    folder = file.split('/')[1]
    for task,table in zip(dict.fromkeys(r['task'] for r in rows(file)), of_board(file), strict=True):
        parts = (folder, folder.replace('further', 'elsewhere')) if task == 'all places' else (folder,)
        mine = [r for part in parts for r in rows(f'results/{part}/rungs.csv')
                if r['decoder'] == CONSTANT and r['good'] and (task == 'all places' or r['task'] in task.split(' | '))]
        for at in ('0.7', '1', '1.6'):
            right = [float(r['good']) for r in mine if float(r['strength']) == float(at)]
            assert float(table[CONSTANT][f'right answers, T = {at}']) == pytest.approx(sum(right)/len(right), abs=.0011), (task, at)


def test_the_other_tables_have_every_decoder_with_its_interval():
    for file in ('results/full/frontier.csv', 'results/embedded/frontier.csv'):
        (table,) = of_board(file)
        for r in rows(file):
            assert table[r['method']]['above the constants'] == with_interval(r['excess'], r['excess_lo'], r['excess_hi'], '+.3f')
            assert table[r['method']]['right answers'] == with_interval(r['accuracy'], r['lo'], r['hi'])
        assert len(table) == len(rows(file))
    interval = lambda d, form='.3f': with_interval(d['mean'], d['lo'], d['hi'], form) if d else ''
    data = {file: json.loads((ROOT/file).read_text(encoding='utf-8')) for _,file,_ in boards() if file.endswith('.json')}
    for file in ('benchmarks/public.json', 'benchmarks/public-gemma.json'):
        (public,), known = of_board(file), data[file]['decoders']
        assert public == {d['decoder']: {'decoder': d['decoder'], 'right answers': interval(d['right']), 'variety': interval(d['variety']),
                                         'above the constants': interval(d['above'], '+.3f')} for d in known}
    (asked,), known = of_board('results/embedded/benchmarks.json'), data['results/embedded/benchmarks.json']
    assert asked == {m: {'decoder': m, 'right answers': interval(r['all']), 'the head above it': interval(known['against'].get(m), '+.3f')}
                     for m,r in known['methods'].items()}
    (text,), known = of_board('results/embedded/evaluate.json'), data['results/embedded/evaluate.json']['scores']
    assert {m: {c: x for c,x in r.items() if c != 'decoder'} for m,r in text.items()} == {
        m: {c: interval(found[m]['p_true']) for c,found in known.items()} for m in known['maths']}
    (tuned,), known = of_board('results/embedded/controls.json'), data['results/embedded/controls.json']['gains']
    assert {m: {c: x for c,x in r.items() if c != 'decoder'} for m,r in tuned.items()} == {
        m: {c: interval(g['static'], '+.3f') for c,g in found.items()} for m,found in known.items()}
    for file in ('results/embedded/ladder.json', 'results/gemma/ladder.json'):
        (sets,) = of_board(file)
        above = {k.removesuffix(f' over {CONSTANT}'): interval(d, '+.2f') for k,d in data[file]['gains'].items() if k.endswith(CONSTANT)}
        assert len(above) > 7 and {m: r['above the constant'] for m,r in sets.items() if m in above} == above
