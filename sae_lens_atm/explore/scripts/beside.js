// Two SAEs side by side: what both have, and what one has that the other lacks.
function besideSummary() {
  const box = document.getElementById("beside-lists");
  if (!box) return;
  box.replaceChildren(...data.saes.map((model, at) => {
    const { latents, matches } = model;
    const alive = [...latents.frequency.keys()].filter((j) => latents.frequency[j] > 0);
    const own = alive.filter((j) => matches.cosine[j] < data.same);
    const first = [...own].sort((a, b) => latents.importance[b] - latents.importance[a]).slice(0, 20);
    return element("div", {},
      element("h3", {}, `Only in ${data.names[at]}`),
      element("p", { class: "small soft" }, `${own.length.toLocaleString("en")} of the ${alive.length.toLocaleString("en")} latents that fire have no match in ${data.names[1 - at]}. The most important of them:`),
      list(first.map((j) => [element("button", { type: "button", class: "link", onclick: () => goToIn(at, j) }, `latent ${j}`), tokensIn(model, j), matches.cosine[j].toFixed(2)])),
    );
  }));
}

function tokensIn(model, latent) {
  return row(model.latents.tokens, latent).filter((t) => t !== NONE).slice(0, 4).map(token);
}

function goToIn(at, latent) {
  const choice = document.getElementById("sae");
  if (Number(choice.value) !== at) {
    choice.value = at;
    show(at);
  }
  goTo(latent);
}

// The match of a latent, for its card.
function matchOf(latent) {
  if (!sae.matches || sae.matches.latent[latent] === NONE) return null;
  const at = 1 - data.saes.indexOf(sae);
  const other = sae.matches.latent[latent];
  return element("div", {}, element("h4", { title: data.meanings.match }, `Match in ${data.names[at]}`),
    list([[element("button", { type: "button", class: "link", onclick: () => goToIn(at, other) }, `latent ${other}`), tokensIn(data.saes[at], other), sae.matches.cosine[latent].toFixed(2)]]));
}
