// A program for a page in a browser: it leaves in `found` all that is wrong with what a reader sees, and how much was looked at.
for (const details of document.querySelectorAll("details")) details.open = true;
tell(); // the event of a page that unfolds comes later
const wrong = [], count = {boxes: 0, wide: 0, sorted: 0, texts: 0, figures: 0, legends: 0};
const all = (chosen, within = document) => [...within.querySelectorAll(chosen)];
const check = (holds, ...words) => { if (!holds) wrong.push(words.join(" ")) };
const place = element => element.getBoundingClientRect();

const width = document.documentElement.scrollWidth;
check(width <= innerWidth, "the page is", width, "wide");

for (const box of all(".scroll")) {
  const name = box.getAttribute("aria-label"), hint = box.previousElementSibling;
  const wide = box.scrollWidth > box.clientWidth, tall = box.scrollHeight > box.clientHeight;
  count.boxes++;
  check(place(box).right <= innerWidth, name, "is cut off");
  const said = place(hint).height > 0 ? hint.textContent : "";
  check(wide === said.includes("columns") && tall === said.includes("rows"), name, wide || tall ? "has no hint" : "does not scroll", said);
  const first = all("tbody th", box)[0], head = all("thead th", box)[0];
  for (const heading of all("tbody th", box))
    for (const node of heading.childNodes)
      for (const word of (node.data ?? "").matchAll(/[a-z]{2,12}/gi)) {
        const range = document.createRange();
        range.setStart(node, word.index);
        range.setEnd(node, word.index + word[0].length);
        check(new Set([...range.getClientRects()].map(r => r.top)).size < 2, name, "breaks the word", word[0], "of", heading.textContent);
      }
  if (!wide) continue;
  count.wide++;
  box.scrollLeft = 1e6;
  check(box.scrollLeft > 0, name, "does not scroll");
  for (const cell of [first, head])
    check(Math.abs(place(cell).left - place(box).left) < 3, name, "takes", cell.textContent, "along");
  check(place(first).width < 0.6 * box.clientWidth, name, "leaves no room beside its first column");
  box.scrollTop = 1e6;
  check(Math.abs(place(head).top - place(box).top) < 3, name, "takes its heading along");
  box.scrollLeft = box.scrollTop = 0;
}

for (const table of all("table.sortable")) {
  const name = table.parentElement.getAttribute("aria-label"), body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, i) => {
    for (const way of ["first", "second"]) {
      all("button", head)[0].click();
      const down = head.getAttribute("aria-sort") === "descending", keys = [...body.rows].map(row => row.cells[i].dataset.key);
      const numbers = keys.filter(key => key !== undefined).map(Number), texts = [...body.rows].map(row => row.cells[i].textContent);
      const order = numbers.length ? numbers : texts;
      const later = numbers.length ? (a, b) => a - b : (a, b) => a.localeCompare(b);
      const sorted = order.every((value, n) => n === 0 || (down ? later(order[n - 1], value) >= 0 : later(order[n - 1], value) <= 0));
      check(sorted, name, "is not sorted by", head.textContent, "at the", way, "click");
      check(keys.slice(numbers.length).every(key => key === undefined), name, "has text among numbers of", head.textContent);
      count.sorted++;
    }
  });
}

const parse = color => color.match(/[\d.]+/g).map(Number);
const light = ([r, g, b]) => {
  const [x, y, z] = [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * x + 0.7152 * y + 0.0722 * z;
};
const contrast = (a, b) => { // WCAG 2.2
  const [low, high] = [light(a), light(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
};
const ground = element => {
  for (let e = element; e; e = e.parentElement) {
    const color = parse(getComputedStyle(e).backgroundColor);
    if (color.length < 4 || color[3] > 0) return color;
  }
};
for (const element of all("body *")) {
  if (element.closest("svg, script") || ![...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
  const value = contrast(parse(getComputedStyle(element).color), ground(element));
  count.texts++;
  check(value >= 4.5, "contrast", value.toFixed(1), "of", element.textContent.slice(0, 40));
}

const page = parse(getComputedStyle(document.body).backgroundColor);
for (const svg of all("figure svg")) {
  const name = svg.getAttribute("aria-label"), frame = place(svg), [sheet, axes] = all('g[id*="patch_"]', svg).map(place);
  count.figures++;
  const paper = getComputedStyle(all('g[id*="patch_1"] path', svg)[0]).fill;
  check(String(parse(paper)) === String(page), name, "is drawn on", paper);
  const drawn = all("[clip-path]", svg).filter(e => !e.closest('[id*="tick_"]')).map(place).filter(r => r.width + r.height > 1);
  check(drawn.length > 0, name, "is empty");
  check(frame.width > 300, name, "is small");
  for (const part of all('g[id*="text_"], g[id*="legend_"]', svg)) {
    const {left, right, top, bottom} = place(part);
    const inside = left >= frame.left - 1 && right <= frame.right + 1 && top >= frame.top - 1 && bottom <= frame.bottom + 1;
    check(inside, name, "cuts off", part.id);
    if (part.id.includes("legend_")) {
      count.legends++;
      check(bottom <= axes.top + 1 || top >= axes.bottom - 1 || left >= axes.right - 1, name, "has a legend over its data");
    }
  }
  for (const e of all("[clip-path]", svg)) {
    const style = getComputedStyle(e), color = style.stroke !== "none" ? style.stroke : style.fill;
    if (!color.startsWith("rgb") || style.strokeOpacity < 1 || e.closest('[id*="patch_"], [id*="Collection"]')) continue;
    check(contrast(parse(color), page) >= 2, name, "has a line in", color);
  }
}
const found = {wrong, count};
