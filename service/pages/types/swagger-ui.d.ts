/** What static/docs/docs.js uses of static/vendor/swagger-ui-*, a plain script that sets a global. */
interface SwaggerUIBundle {
  (options: {
    url: string;
    domNode: HTMLElement;
    deepLinking?: boolean;
    displayRequestDuration?: boolean;
    validatorUrl?: string | null;
    layout?: string;
    presets?: unknown[];
  }): unknown;
  presets: { apis: unknown };
}

/** Undefined where the script could not be loaded. */
declare var SwaggerUIBundle: SwaggerUIBundle | undefined;
