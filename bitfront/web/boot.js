// Runs before the first paint (a classic script, not a module): who chose dark sees no white flash.
try {
  const chosen = localStorage.getItem("bitfront-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // storage may be forbidden; the system's colours are right, then
}
