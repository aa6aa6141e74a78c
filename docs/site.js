// A table with the class `sortable` is sorted by the column whose heading is chosen; rows without a value stay last
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0]
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") === "descending" // numbers are first sorted from the largest
    const value = row => row.cells[column].dataset.value
    const compare = (a, b) => {
      if (value(a) === "" || value(b) === "") return (value(a) === "") - (value(b) === "")
      const order = value(a).localeCompare(value(b), "en", { numeric: true })
      const number = Number(value(a)) - Number(value(b))
      return (up ? 1 : -1) * (Number.isNaN(number) ? order : number)
    }
    heads.forEach(x => x.setAttribute("aria-sort", x === head ? (up ? "ascending" : "descending") : "none"))
    body.append(...[...body.rows].sort(compare))
  }))
}
