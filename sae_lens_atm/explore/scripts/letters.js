// First letters: the latents that detect each, and the words that they miss.
function drawLetters() {
  const section = document.getElementById("letters-section");
  section.hidden = !sae.letters;
  if (!sae.letters) return;
  const lines = sae.letters.map((letter) => element("tr", {},
    element("th", { scope: "row" }, element("button", { type: "button", class: "link", onclick: () => showLetter(letter) }, letter.letter)),
    element("td", { class: "text" }, letter.latents.flatMap((j) => [latentLink(j), " "])),
    element("td", {}, String(letter.words)), element("td", {}, String(letter.missed)), element("td", {}, String(letter.absorbed)),
  ));
  document.querySelector("#letters-table tbody").replaceChildren(...lines);
  const first = [...sae.letters].sort((a, b) => b.absorbed - a.absorbed)[0];
  if (first) showLetter(first);
  else document.getElementById("letter").replaceChildren("No letter has a probe that is good enough.");
}

function showLetter(letter) {
  const words = letter.missed_words.map((missed) => element("tr", {},
    element("td", { class: "text" }, element("span", { class: "token" }, missed.word)),
    element("td", { class: "text" }, latentLink(missed.latent), " ", tokensOf(missed.latent, 3)),
    element("td", {}, percent(missed.share)),
    element("td", { class: "text" }, missed.absorbed ? element("span", { class: "tag" }, "absorbed") : ""),
  ));
  const rest = letter.missed - letter.missed_words.length;
  document.getElementById("letter").replaceChildren(
    element("h3", {}, `The letter ${letter.letter.toUpperCase()}: missed words`),
    element("p", { class: "small soft" }, `F1 of the probe ${letter.probe_f1.toFixed(2)}, absorbed fraction ${percent(letter.fraction)}. Beside each word is the latent that adds most along the letter's direction in its place, and its share.`),
    words.length ? element("div", { class: "scroll" }, element("table", {}, element("tbody", {}, words))) : element("p", {}, "None."),
    rest > 0 ? element("p", { class: "small soft" }, `and ${rest} more`) : "",
  );
}
