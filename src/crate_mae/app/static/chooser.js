// A place to drop a picture, and pictures to begin with. A file is read here and sent as text: no file arrives at the
// server. The value is the present picture, which is kept in this tab alone.
const zone = element.querySelector(".drop");
const input = element.querySelector("input");
const list = element.querySelector(".examples");
const message = element.querySelector(".message");
let attempt = 0; // of the visitor to choose a picture: what the server says of an earlier one is old news

function say(text) {
  message.textContent = text;
  message.hidden = !text;
}

function send(file) {
  if (!file) return;
  attempt += 1;
  if (file.size > props.max_bytes) return say(props.too_large);
  say("");
  const own = attempt;
  const reader = new FileReader();
  reader.onload = () => trigger("upload", { content: reader.result, attempt: own });
  reader.onerror = () => say("Your browser could not read this file.");
  reader.readAsDataURL(file);
}

input.addEventListener("change", () => {
  send(input.files[0]);
  input.value = ""; // so that the same file can be chosen again
});
for (const kind of ["dragenter", "dragover"]) {
  zone.addEventListener(kind, (event) => {
    event.preventDefault();
    zone.classList.add("over");
  });
}
for (const kind of ["dragleave", "drop"]) zone.addEventListener(kind, () => zone.classList.remove("over"));
zone.addEventListener("drop", (event) => {
  event.preventDefault();
  send(event.dataTransfer.files[0]);
});

list.replaceChildren(
  ...props.examples.map((example, number) => {
    const choice = document.createElement("button");
    choice.type = "button";
    choice.title = `${example.title} (${example.credit})`;
    choice.setAttribute("aria-label", example.title);
    const picture = document.createElement("img");
    picture.src = example.picture;
    picture.alt = "";
    choice.append(picture);
    choice.addEventListener("click", () => {
      say("");
      attempt += 1;
      trigger("select", { number, attempt });
    });
    return choice;
  }),
);
watch("message", () => {
  const [answered, text] = props.message;
  if (answered === attempt) say(text);
});
