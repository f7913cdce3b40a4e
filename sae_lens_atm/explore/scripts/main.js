// Starts the page: reads the data, draws the first latent, follows theme and address.
let data = null;
let sae = null;
const chosen = { latent: 0, pair: null };

function show(index) {
  sae = data.saes[index];
  view.texts = null;
  arrange();
  drawTree();
  drawLetters();
  select(view.order.find((j) => !stateOf(j)) ?? 0);
}

function followAddress() {
  const found = /^#latent=(\d+)$/.exec(location.hash);
  if (found && Number(found[1]) < sae.latents.frequency.length) goTo(Number(found[1]));
}

readData().then((read) => {
  const asked = location.hash;
  data = read;
  data.saes.forEach(link);
  setUpTable();
  setUpTree();
  show(0);
  besideSummary();
  history.replaceState(null, "", asked || location.pathname);
  followAddress();
  addEventListener("hashchange", followAddress);
  document.getElementById("sae")?.addEventListener("change", (event) => show(Number(event.target.value)));
  document.documentElement.dataset.drawn = "";
}, () => { document.getElementById("too-old").hidden = false; });

const themeButton = document.getElementById("theme");
function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  themeButton.textContent = theme === "dark" ? "Light theme" : "Dark theme";
}
setTheme(document.documentElement.dataset.theme);
themeButton.addEventListener("click", () => {
  chosenTheme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  try { localStorage.setItem("sae-lens-atm-theme", chosenTheme); } catch { /* not stored */ }
  setTheme(chosenTheme);
});
systemDark.addEventListener("change", (event) => {
  if (!chosenTheme) setTheme(event.matches ? "dark" : "light");
});
