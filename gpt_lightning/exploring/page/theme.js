// Runs before the first paint, so a dark page does not flash white.
document.documentElement.dataset.theme = localStorage.getItem("gpt_lightning theme") ?? "";
