//! The scores of attention.

use crate::softcap::Softcap;

/// How scores of attention are computed from products of queries and keys.
///
/// The scores are `scale · q kᵀ` or, with a soft cap, `cap · tanh(scale · q kᵀ / cap)` (Gemma Team 2024,
/// arXiv:2408.00118, section 2). A number is a scale without a cap.
///
/// # Examples
/// ```
/// use kernels::Scores;
///
/// assert_eq!(Scores::from(0.125), Scores::new(0.125));
/// let capped = Scores::new(0.125).with_softcap(50.0);
/// assert_ne!(capped, Scores::new(0.125));
/// assert_eq!(capped.with_softcap(None), Scores::new(0.125));
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scores {
    pub(super) scale: f64,
    pub(super) softcap: Option<Softcap>,
}

impl Scores {
    /// Scores of a scale, without a cap.
    pub fn new(scale: f64) -> Self {
        Self {
            scale,
            softcap: None,
        }
    }

    /// Sets the bound that scores approach, none by default.
    ///
    /// # Panics
    /// If the cap is not positive and finite.
    #[track_caller]
    pub fn with_softcap(mut self, softcap: impl Into<Option<f64>>) -> Self {
        self.softcap = softcap.into().map(Softcap::new);
        self
    }
}

impl From<f64> for Scores {
    fn from(scale: f64) -> Self {
        Self::new(scale)
    }
}
