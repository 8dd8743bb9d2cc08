// The page's program: takes an image, shows what is written of it, draws it, and copies it.

const { katex: typesetter, join, news, largest, doubt } = document.getElementById("program").dataset;
const katex = (await import(typesetter)).default;
const [drop, file, image, formula, undrawn, marks, latex, copy, stop, said, certainty] = [
  "drop", "file", "image", "formula", "undrawn", "marks", "latex", "copy", "stop", "said", "certainty",
].map((id) => document.getElementById(id));

const nothing = formula.firstElementChild; // what is there before a formula

let pieces = []; // of the reading, [text, how sure the model was], as they came
let doubts = []; // what is marked, [from, to] in the text
let written = ""; // the text before an edit
let leave = () => {}; // ends the reading that is on its way
let shown; // the address of the image that is shown, or will be when it has been decoded

function say(sentence, bad = false) {
  said.textContent = sentence;
  said.classList.toggle("bad", bad);
}

// ---------------------------------------------------------------------------------------------------------------------
// Reading
// ---------------------------------------------------------------------------------------------------------------------

async function read(blob) {
  leave();
  [pieces, doubts, latex.value, written, certainty.textContent] = [[], [], "", "", ""];
  update();
  show();
  if (blob.size > largest) return say(`This can't be read: over ${largest / 1e6} MB.`, true);
  show(URL.createObjectURL(blob)); // at once, if it is of a kind that browsers know
  const session = crypto.getRandomValues(new Uint32Array(4)).join("-");
  let [left, events] = [false, null];
  const end = () => {
    left = true;
    events?.close(); // the server sees it, and reads no further
    [latex.readOnly, stop.hidden] = [false, true];
    draw();
  };
  leave = end;
  const fail = (sentence) => {
    end();
    say(sentence, true);
  };
  [latex.readOnly, stop.hidden] = [true, false];
  say("Sending …");
  try {
    const asked = { data: [await base64(blob)], fn_index: 0, session_hash: session, simple_format: true };
    const headers = { "Content-Type": "application/json" };
    const answer = await fetch(join, { method: "POST", headers, body: JSON.stringify(asked) });
    if (left) {
      listen(session).onopen = ({ target }) => target.close(); // so that it is not read
      return;
    }
    if (answer.status === 503) return fail("Too many images are waiting. Try again in a while.");
    if (!answer.ok) return fail(`This can't be read: ${answer.status === 413 ? await answer.text() : answer.status}.`);
  } catch {
    return left || fail("The server can't be reached.");
  }
  events = listen(session);
  events.onerror = () => fail("The connection to the server was lost.");
  events.onmessage = (event) => {
    const message = JSON.parse(event.data);
    if (message.msg === "estimation") say(message.rank ? `Waiting: ${message.rank} before you.` : "You are next.");
    else if (message.msg === "process_starts") say("Reading …");
    else if (message.msg === "process_generating" && message.success) take(message.output.data[0], end);
    else if (message.msg === "process_completed" && message.success) end();
    else if (message.msg === "process_completed") fail("That failed; the server's terminal says why.");
  };
}

function listen(session) {
  return new EventSource(`${news}?session_hash=${session}`);
}

function take(told, end) {
  if (told.error) {
    end();
    show();
    say(told.error, true);
  } else if (told.picture) {
    show(told.picture);
  } else if ("certainty" in told) {
    end();
    say(told.cut ? "It was cut off at the length limit." : "");
    tell(told.certainty);
  } else {
    write(told.text, told.probability);
  }
}

function write(text, sure) {
  pieces.push([text, sure]);
  const from = written.length + text.length - text.trimStart().length;
  written = latex.value += text;
  const to = written.trimEnd().length;
  if (sure < doubt && from < to) doubts.push([from, to]);
  update();
}

function base64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = reject;
    reader.readAsDataURL(blob);
  });
}

// Shows the image at an address, if browsers know its kind; without one, none.
function show(address) {
  if (shown?.startsWith("blob:")) URL.revokeObjectURL(shown);
  shown = address;
  if (!address) return (image.hidden = true);
  const picture = new Image();
  picture.onload = () => {
    if (shown === address) [image.src, image.hidden] = [address, false];
  };
  picture.src = address;
}

function tell(mean) {
  const percent = (share) => `${Math.floor(share * 100)}%`;
  const [least, lowest] = pieces.filter(([text]) => text.trim()).reduce((a, b) => (b[1] < a[1] ? b : a), ["", 1]);
  certainty.textContent = `The model was ${percent(mean)} sure of each token on average`;
  if (least) {
    const token = document.createElement("code");
    token.textContent = least.trim();
    certainty.append(", least of ", token, ` (${percent(lowest)})`);
  }
  certainty.append(". ");
  if (doubts.length) {
    const mark = document.createElement("mark");
    mark.textContent = "Marked";
    certainty.append(mark, `: less than ${percent(doubt)} sure.`);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The LaTeX, what is marked in it, and how it looks
// ---------------------------------------------------------------------------------------------------------------------

// An edit moves the marks behind it, and takes those that it touches.
function edit() {
  const text = latex.value;
  const shorter = Math.min(text.length, written.length);
  let [start, end] = [0, 0];
  while (start < shorter && text[start] === written[start]) start++;
  while (end < shorter - start && text[text.length - 1 - end] === written[written.length - 1 - end]) end++;
  const [rest, shift] = [written.length - end, text.length - written.length];
  doubts = doubts
    .filter(([from, to]) => to <= start || from >= rest)
    .map(([from, to]) => (to <= start ? [from, to] : [from + shift, to + shift]));
  written = text;
}

function mark() {
  const parts = [];
  let done = 0;
  for (const [from, to] of doubts) {
    const marked = document.createElement("mark");
    marked.textContent = latex.value.slice(from, to);
    parts.push(latex.value.slice(done, from), marked);
    done = to;
  }
  marks.replaceChildren(...parts, `${latex.value.slice(done)}\u200b`); // an empty last line has a height, too
}

// Without the dollars or brackets that some models write around a formula.
function bare() {
  const text = latex.value.trim();
  const found = /^(?:\$\$([^]*)\$\$|\$([^]*)\$|\\\[([^]*)\\\]|\\\(([^]*)\\\))$/.exec(text);
  return found ? found.slice(1).find((inner) => inner !== undefined).trim() : text;
}

// While it is written, braces are open.
function closed(text) {
  const open = text.replace(/\\./g, "").replace(/[^{}]/g, "");
  const depth = open.split("{").length - open.split("}").length;
  return text + "}".repeat(Math.max(depth, 0));
}

function draw() {
  const text = bare();
  const drawing = document.createElement("div");
  const how = { displayMode: true, strict: "ignore", maxSize: 20, maxExpand: 200 };
  try {
    katex.render(latex.readOnly ? closed(text) : text, drawing, how);
    formula.replaceChildren(text ? drawing : nothing);
    formula.classList.remove("old");
    undrawn.hidden = true;
    fit();
  } catch (error) {
    if (latex.readOnly) return; // what was drawn before stays until more is there
    formula.classList.add("old");
    const reason = error.message.replace(/^KaTeX parse error: /, "").replace(/\u0332/g, ""); // it underlines by those
    undrawn.textContent = `This can't be drawn: ${reason}`;
    undrawn.hidden = false;
  }
}

// A long formula is drawn smaller, down to where it is scrolled.
function fit() {
  const drawing = formula.firstElementChild;
  drawing.style.fontSize = "";
  const share = drawing.clientWidth / drawing.scrollWidth;
  if (share < 1) drawing.style.fontSize = `${Math.max(share, 0.6)}em`;
}

let due;
function update(delay = 0) {
  mark();
  copy.disabled = !latex.value.trim();
  clearTimeout(due);
  if (delay) due = setTimeout(draw, delay);
  else draw();
}

// ---------------------------------------------------------------------------------------------------------------------
// What people do
// ---------------------------------------------------------------------------------------------------------------------

document.fonts.addEventListener("loadingdone", fit);
addEventListener("resize", fit);
latex.addEventListener("input", () => {
  edit();
  update(150);
});
stop.addEventListener("click", () => {
  leave();
  say("Stopped.");
});
file.addEventListener("change", () => {
  if (file.files[0]) read(file.files[0]);
  file.value = ""; // else the same file again would be no change
});
document.addEventListener("paste", (event) => {
  if (!event.clipboardData.files[0]) return; // text, for the text field
  event.preventDefault();
  read(event.clipboardData.files[0]);
});
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files[0]) read(event.dataTransfer.files[0]);
  });
}
for (const example of document.querySelectorAll(".example")) {
  example.addEventListener("click", async () => read(await (await fetch(example.firstChild.src)).blob()));
}

copy.addEventListener("click", async () => {
  const form = document.querySelector(".forms :checked").value;
  const text = { bare: bare(), inline: `$${bare()}$`, display: `\\[${bare()}\\]` }[form];
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    copyByHand(text); // browsers have no clipboard for pages that come unencrypted from another machine
  }
  copy.textContent = "Copied";
  setTimeout(() => (copy.textContent = "Copy"), 1500);
});

function copyByHand(text) {
  const field = document.createElement("textarea");
  field.value = text;
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

file.disabled = false; // all is in place
