// A picture under a grid of patches. In the mode "paint" a stroke hides patches, or uncovers them if it starts on a hidden
// one; the value is the mask, "1" where hidden. In the mode "pick" a click chooses a patch; the value is its number.
const frame = element.querySelector(".patch-grid");
const picture = frame.querySelector("img");
const cells = frame.querySelector(".cells");
const painting = props.mode === "paint";
let brush = null; // what the current stroke does: true hides, false uncovers, null means no stroke
let mask = "";

function draw() {
  picture.src = props.picture;
  frame.style.aspectRatio = `${props.columns} / ${props.rows}`;
  cells.style.gridTemplateColumns = `repeat(${props.columns}, 1fr)`;
  const count = props.rows * props.columns;
  if (cells.childElementCount !== count) {
    cells.replaceChildren(...Array.from({ length: count }, (_, number) => button(number)));
  }
  mask = String(props.value);
  for (let number = 0; number < count; number++) show(number);
}

function button(number) {
  const cell = document.createElement("button");
  cell.type = "button";
  cell.tabIndex = number === 0 ? 0 : -1; // one tab stop; arrow keys move between patches
  const [row, column] = [Math.floor(number / props.columns), number % props.columns];
  cell.setAttribute("aria-label", `patch in row ${row + 1}, column ${column + 1}`);
  return cell;
}

function show(number) {
  const on = painting ? mask[number] === "1" : number === Number(props.value);
  cells.children[number].setAttribute("aria-pressed", on);
}

function paint(number) {
  mask = mask.slice(0, number) + (brush ? "1" : "0") + mask.slice(number + 1);
  show(number);
}

function commit(value) {
  props.value = value;
  draw();
  trigger("input");
}

function patchAt(event) {
  const box = cells.getBoundingClientRect();
  const column = Math.floor(((event.clientX - box.left) / box.width) * props.columns);
  const row = Math.floor(((event.clientY - box.top) / box.height) * props.rows);
  const inside = column >= 0 && column < props.columns && row >= 0 && row < props.rows;
  return inside ? row * props.columns + column : null;
}

function act(number) {
  if (!painting) return commit(number);
  brush = mask[number] !== "1";
  paint(number);
}

cells.addEventListener("pointerdown", (event) => {
  const number = patchAt(event);
  if (number === null || event.button !== 0) return;
  if (painting) cells.setPointerCapture(event.pointerId);
  act(number);
});
cells.addEventListener("pointermove", (event) => {
  const number = patchAt(event);
  if (brush !== null && number !== null) paint(number);
});
for (const end of ["pointerup", "pointercancel"]) {
  cells.addEventListener(end, () => {
    if (brush === null) return;
    brush = null;
    commit(mask);
  });
}
cells.addEventListener("keydown", (event) => {
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -props.columns, ArrowDown: props.columns };
  const number = Array.from(cells.children).indexOf(document.activeElement);
  if (number < 0) return;
  if (event.key in steps) {
    const next = cells.children[number + steps[event.key]];
    if (next) {
      cells.children[number].tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    }
  } else if (event.key === " " || event.key === "Enter") {
    act(number);
    if (painting) {
      brush = null;
      commit(mask);
    }
  } else return;
  event.preventDefault();
});

watch(["value", "picture", "rows", "columns"], draw);
draw();
