//! Default learning rates of AdamW by what is trained and by the width of the model.

/// The width at which the rates were fitted, the hidden size of the embedded models of the examples.
const WIDTH: f64 = 128.0;

pub(crate) fn of_factors(hidden_size: usize) -> f64 {
    5e-3 * (WIDTH / hidden_size as f64)
}

pub(crate) fn of_elements(hidden_size: usize) -> f64 {
    2e-3 * (WIDTH / hidden_size as f64)
}

pub(crate) fn of_scales() -> f64 {
    2e-3
}
