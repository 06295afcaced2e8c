// An area to drop a picture on, and example pictures. Files are read here and sent as text, so that the server receives no
// file. The value is the current picture, which is kept in this tab only.
const zone = element.querySelector(".drop");
const input = element.querySelector("input");
const list = element.querySelector(".examples");
const message = element.querySelector(".message");
let attempt = 0; // number of the visitor's attempt to choose a picture; messages about earlier attempts are ignored

function showMessage(text) {
  message.textContent = text;
  message.hidden = !text;
}

function send(file) {
  if (!file) return;
  attempt += 1;
  if (file.size > props.max_bytes) return showMessage(props.too_large);
  showMessage("");
  const own = attempt;
  const reader = new FileReader();
  reader.onload = () => trigger("upload", { content: reader.result, attempt: own });
  reader.onerror = () => showMessage("Your browser could not read this file.");
  reader.readAsDataURL(file);
}

input.addEventListener("change", () => {
  send(input.files[0]);
  input.value = ""; // allows choosing the same file again
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
      showMessage("");
      attempt += 1;
      trigger("select", { number, attempt });
    });
    return choice;
  }),
);
watch("message", () => {
  const [answered, text] = props.message;
  if (answered === attempt) showMessage(text);
});
