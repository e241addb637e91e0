use serde::{Deserialize, Deserializer, Serialize};

/// The distance of a merged layer from the adapted one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Exactness {
    /// The merged weight is computed from the same numbers by the same operations: on the CPU every
    /// output is bit-equal.
    Exact,
    /// The merged weight is the sum of weight and adapter, rounded to `f32`: with DoRA, the sum times
    /// the factors that the adapted layer computes. Or it was rounded to the floats of a file, on the same
    /// codes, and the error measured.
    Bounded {
        /// No element is further from the exact result.
        #[serde(deserialize_with = "number")]
        max_weight_error: f64,
        /// The largest magnitude of an element.
        #[serde(deserialize_with = "number")]
        max_weight: f64,
    },
    /// The sum of weight and adapter was rounded to a grid.
    Rounded {
        /// `‖Ŵ - W'‖ / ‖W'‖`, with the sum `W'` and the rounded weight `Ŵ`.
        #[serde(deserialize_with = "number")]
        relative_error: f64,
        /// The part of the adapter's change of the weight that is kept:
        /// `⟨Ŵ - W, W' - W⟩ / ‖W' - W‖²`, with the weight `W` of the base.
        #[serde(deserialize_with = "number")]
        retention: f64,
    },
}

/// Reads a number; one that is not finite is `null` in JSON, and becomes NaN.
pub(crate) fn number<'de, D: Deserializer<'de>>(json: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(json)?.unwrap_or(f64::NAN))
}
