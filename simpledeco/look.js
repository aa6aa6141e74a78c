const find = id => document.getElementById(id), f = Math.fround, data = JSON.parse(find('sd-data').textContent)
const slider = find('sd-scale'), box = find('sd-box'), texts = [...document.querySelectorAll('.sd-a')], known = new Map()
const tokens = text => [...text.querySelectorAll('.sd-t')], most = list => Math.max(...list)
let scale, open, stay // the token whose box is open, and the one that has the focus

texts.forEach((text, k) => {
  const {numbers, groups} = data.answers[k]
  const all = new Float32Array(Uint8Array.from(atob(numbers), c => c.charCodeAt(0)).buffer)
  let i = 0
  const read = ([n, rank, ...names]) => {
    const [own, logit, logZ] = all.subarray(i, i + 3)
    return {own, logit, logZ, rank, names: names.map(j => data.names[j]), top: all.subarray(i + 3, i += n + 3)}
  }
  tokens(text).forEach((el, g) => { known.set(el, groups[g].map(read)); el.tabIndex = g ? -1 : 0 })
})

function at(x) { // what token_report says, in single precision as there
  const T = f(f(scale)*x.own), low = f(f(x.top[0]/T) + f(data.low)), kept = x.top.filter(z => f(z/T) >= low)
  const mass = kept.reduce((sum, z) => sum + Math.exp((z - x.top[0])/T), 0)
  const p = z => f(z/T) >= low && Math.exp((z - x.top[0])/T)/mass
  return {T, p, kept: f(x.logit/T) >= low, count: kept.length, more: kept.length == data.most}
}

function heat(T) {
  const [cold, mild, hot] = data.heat, x = Math.min(T/2, 1)
  const [a, b, t] = x < .5 ? [cold, mild, 2*x] : [mild, hot, 2*x - 1]
  return `rgb(${a.map((p, i) => Math.round(p + (b[i] - p)*t))})`
}

function show(el) {
  open?.removeAttribute('aria-describedby')
  open = el
  box.hidden = !el
  if (!el) return
  el.setAttribute('aria-describedby', 'sd-box')
  box.replaceChildren(...known.get(el).flatMap(about))
  place()
}

function make(tag, ...inside) { const el = document.createElement(tag); el.append(...inside); return el }

function about(x) {
  const {T, p, kept, count, more} = at(x), gap = x.top[0] - x.logit, percent = p => p < .0005 ? '< 0.1%' : (100*p).toFixed(1) + '%'
  const row = (name, z, own) => {
    const q = p(z), now = q === false ? 'cut' : (more ? '≤ ' : '') + percent(q)
    const tr = make('tr', make('th', make('bdi', name)), make('td', now), make('td', percent(Math.exp(z - x.top[0] - x.logZ))))
    tr.className = own ? 'sd-own' : ''
    return tr
  }
  const rows = x.names.map((name, i) => row(name, x.top[i], i == x.rank - 1))
  if (x.rank > rows.length) rows.push(row('this token', x.logit, true))
  const top = make('tr', make('th', 'candidate'), make('td', `T = ${T.toFixed(2)}`), make('td', 'T = 1'))
  const lines = [`temperature ${T.toFixed(2)}`, `gap ${gap.toFixed(2)} nats, rank ${x.rank}`,
    `needs ${(gap/-data.low).toFixed(2)}: ${kept ? 'kept' : 'cut'}`, `candidates: ${count}${more ? ' or more' : ''}`]
  return [make('p', lines.join('\n')), make('table', top, ...rows)]
}

function place() { // beside the token, and on the screen
  if (!open) return
  const r = open.getBoundingClientRect(), {offsetWidth: w, offsetHeight: h} = box
  const {clientWidth: W, clientHeight: H} = document.documentElement
  const below = r.bottom + h + 8 <= H, above = r.top - h >= 8, room = below || above
  const left = room ? r.left : r.right + w + 16 <= W ? r.right + 8 : r.left - w - 8
  box.style.left = most([8, Math.min(left, W - w - 8)]) + 'px'
  box.style.top = most([8, below ? r.bottom : above ? r.top - h : H - h - 8]) + 'px'
}

function set(value) {
  scale = slider.value = value
  find('sd-now').textContent = +value.toPrecision(4)
  texts.forEach(text => {
    const facts = tokens(text).map(el => {
      const found = known.get(el).map(at), T = most(found.map(x => x.T)), kept = found.every(x => x.kept)
      el.classList.toggle('sd-cut', !kept)
      el.style.borderColor = heat(T)
      el.lastChild.textContent = `\u00a0${T.toFixed(1)}${kept ? '' : '\u00a0×'}\u00a0`
      return found
    }).flat()
    const mean = facts.reduce((sum, x) => sum + x.T, 0)/facts.length, lost = facts.filter(x => !x.kept).length
    text.parentNode.querySelector('.sd-sum').textContent =
      `${facts.length} tokens, mean temperature ${mean.toFixed(2)}, ${lost} cut`
  })
  if (open) show(open)
}

function restore() {
  const wanted = Number(new URLSearchParams(location.hash.slice(1)).get('scale'))
  set(wanted > 0 ? Math.min(wanted, slider.max) : data.scale)
}

function line(all, from, way) { // the nearest token on the next line
  const at = el => { const r = el.getBoundingClientRect(); return {el, y: r.bottom, x: (r.left + r.right)/2} }
  const here = at(from), other = all.map(at).filter(t => (t.y - here.y)*way > 8)
  const y = way*Math.min(...other.map(t => t.y*way))
  return other.filter(t => Math.abs(t.y - y) < 8).sort((a, b) => Math.abs(a.x - here.x) - Math.abs(b.x - here.x))[0]?.el
}

document.addEventListener('keydown', e => {
  if (e.key == 'Escape') { stay = null; show(null) }
  if (e.ctrlKey || e.altKey || e.metaKey || e.shiftKey || !known.has(e.target)) return
  const text = e.target.closest('.sd-a'), all = tokens(text), i = all.indexOf(e.target)
  const step = getComputedStyle(text).direction == 'rtl' ? -1 : 1
  const to = {ArrowRight: () => all[i + step], ArrowLeft: () => all[i - step], Home: () => all[0], End: () => all.at(-1),
    ArrowDown: () => line(all, e.target, 1), ArrowUp: () => line(all, e.target, -1)}[e.key]?.()
  if (to) { e.preventDefault(); to.focus() }
})
document.addEventListener('focusin', e => {
  stay = known.has(e.target) ? e.target : null
  if (stay) tokens(stay.closest('.sd-a')).forEach(el => { el.tabIndex = el == stay ? 0 : -1 })
  show(stay)
})
document.addEventListener('focusout', () => { stay = null; show(null) })
document.addEventListener('pointerover', e => { if (!box.contains(e.target)) show(e.target.closest('.sd-t') ?? stay) })
addEventListener('scroll', place)
addEventListener('resize', place)
addEventListener('hashchange', restore)
slider.addEventListener('input', () => set(+slider.value))
slider.addEventListener('change', () => history.replaceState(null, '', `#scale=${scale}`))
document.querySelectorAll('.sd-js').forEach(el => { el.hidden = false })
document.body.classList.add('sd-live')
restore()
