// Charts have a white background, so the app has one too. Gradio sets dark mode when the app is displayed, perhaps after this
// runs, and again when the visitor's system switches to dark mode.
() => {
  const classes = document.body.classList;
  const lighten = () => classes.contains("dark") && classes.remove("dark"); // removing a missing class is also a mutation
  new MutationObserver(lighten).observe(document.body, { attributeFilter: ["class"] });
  lighten();
};
