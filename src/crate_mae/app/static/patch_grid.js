// A picture under a grid of patches. In the mode "paint" a stroke hides patches, or uncovers them if it starts on a hidden
// one; the value is the mask, "1" where hidden. In the mode "pick" a click chooses a patch; the value is its number.
// On a touch screen, a stroke that starts up or down scrolls instead (touch-action in page.css) and ends in pointercancel.
const frame = element.querySelector(".patch-grid");
const picture = frame.querySelector("img");
const cells = frame.querySelector(".cells");
const painting = props.mode === "paint";
let brush = null; // what the current stroke does: true hides, false uncovers, null means no stroke
let mask = "";
let maskBefore = ""; // the current stroke
let from = null; // the last point of the current stroke, in patches from the upper left corner

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

function pointOf(event) {
  const box = cells.getBoundingClientRect();
  return {
    x: ((event.clientX - box.left) / box.width) * props.columns,
    y: ((event.clientY - box.top) / box.height) * props.rows,
  };
}

function patchAt(point) {
  const [column, row] = [Math.floor(point.x), Math.floor(point.y)];
  const inside = column >= 0 && column < props.columns && row >= 0 && row < props.rows;
  return inside ? row * props.columns + column : null;
}

// Paints the straight line from the last point: a quick pointer is reported once in several patches.
function paintTo(point) {
  const steps = Math.max(1, Math.ceil(4 * Math.hypot(point.x - from.x, point.y - from.y)));
  for (let step = 1; step <= steps; step++) {
    const share = step / steps;
    const number = patchAt({ x: from.x + share * (point.x - from.x), y: from.y + share * (point.y - from.y) });
    if (number !== null) paint(number);
  }
  from = point;
}

function act(number) {
  if (!painting) return commit(number);
  maskBefore = mask;
  brush = mask[number] !== "1";
  paint(number);
}

if (painting) {
  cells.addEventListener("pointerdown", (event) => {
    from = pointOf(event);
    const number = patchAt(from);
    if (number === null || event.button !== 0 || !event.isPrimary) return;
    cells.setPointerCapture(event.pointerId);
    act(number);
  });
  cells.addEventListener("pointermove", (event) => {
    if (brush !== null && event.isPrimary) paintTo(pointOf(event));
  });
  cells.addEventListener("pointerup", (event) => {
    if (brush === null || !event.isPrimary) return;
    brush = null;
    commit(mask);
  });
  cells.addEventListener("pointercancel", () => {
    if (brush === null) return;
    brush = null;
    mask = maskBefore;
    draw();
  });
} else {
  cells.addEventListener("click", (event) => {
    const number = patchAt(pointOf(event));
    if (number !== null && event.detail > 0) act(number); // keys are handled below
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
