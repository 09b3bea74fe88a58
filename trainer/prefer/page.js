// Shows a pair, sends the vote, shows the next. A vote that could not be saved leaves the pair where it is and says so.
const at = (id) => document.getElementById(id);
let rater = "", shown = null, busy = false;

async function ask(path, body) {
  const options = body ? { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) } : {};
  const answer = await fetch(path, options);
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error);
  return found;
}

async function show(found) {
  at("bar").max = found.total;
  at("bar").value = found.done;
  at("count").textContent = `${found.done} of ${found.total}`;
  shown = found.pair === null ? null : found;
  at("pair").hidden = shown === null;
  at("done").hidden = shown !== null;
  if (shown === null) return;
  at("prompt").textContent = found.prompt;
  const pictures = ["left", "right"].map((side) => {
    const picture = at(side).querySelector("img");
    picture.src = `picture/${found[side]}`;
    return picture.decode();
  });
  await Promise.all(pictures); // nobody judges a picture that is not there yet
}

async function work(what, said) {
  if (busy) return;
  busy = true;
  try {
    await show(await what());
    at("saved").textContent = said;
    at("saved").className = "";
  } catch (error) {
    at("saved").textContent = error.message || "The server does not answer.";
    at("saved").className = "trouble";
  }
  busy = false;
}

const vote = (choice) => shown && work(() => ask("api/vote", { rater, pair: shown.pair, choice }), "saved");
const back = () => work(async () => {
  const found = await ask("api/back", { rater });
  return found.pair === null ? ask(`api/next?rater=${encodeURIComponent(rater)}`) : found;
}, "");

at("start").addEventListener("submit", (event) => {
  event.preventDefault();
  rater = at("rater").value.trim();
  if (!rater) return;
  at("start").hidden = true;
  work(() => ask(`api/next?rater=${encodeURIComponent(rater)}`), "");
});
for (const side of ["left", "right", "tie"]) at(side).addEventListener("click", () => vote(side));
at("back").addEventListener("click", back);
document.addEventListener("keydown", (event) => {
  if (!rater || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  const choice = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie" }[event.key];
  if (choice) vote(choice);
  else if (event.key === "Backspace") back();
  else return;
  event.preventDefault();
});
