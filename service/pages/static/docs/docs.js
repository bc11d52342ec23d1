/**
 * Shows the service's OpenAPI document with Swagger UI, light or dark as the system is set.
 *
 * Swagger UI is a plain script that the page loads before this module.
 */

const dark = matchMedia("(prefers-color-scheme: dark)");

function followSystem() {
  document.documentElement.classList.toggle("dark-mode", dark.matches);
}

dark.addEventListener("change", followSystem);
followSystem();

const place = /** @type {HTMLElement} */ (document.getElementById("api"));
if (globalThis.SwaggerUIBundle === undefined) {
  place.textContent = "Swagger UI could not be loaded; reload the page, or read openapi.json.";
} else {
  globalThis.SwaggerUIBundle({
    url: new URL("openapi.json", document.baseURI).href,
    domNode: place,
    deepLinking: true,
    displayRequestDuration: true,
    validatorUrl: null, // or it sends the document's address to a server of its makers
    layout: "BaseLayout",
    presets: [globalThis.SwaggerUIBundle.presets.apis],
  });
}
