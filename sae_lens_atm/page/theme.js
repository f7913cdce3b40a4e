// Runs before the page is painted. Without a stored choice the system's theme is used.
const systemDark = matchMedia("(prefers-color-scheme: dark)");
let chosenTheme = null;
try { chosenTheme = localStorage.getItem("sae-lens-atm-theme"); } catch { /* storage is blocked */ }
document.documentElement.dataset.theme = chosenTheme ?? (systemDark.matches ? "dark" : "light");
