// The pictures of curves are white, so the page is too. Gradio darkens it when it is shown, perhaps later than this runs,
// and again when the visitor's system turns dark.
() => {
  const classes = document.body.classList;
  const lighten = () => classes.contains("dark") && classes.remove("dark"); // to remove what is not there is a change, too
  new MutationObserver(lighten).observe(document.body, { attributeFilter: ["class"] });
  lighten();
};
