use std::collections::BTreeMap;

use quant_core::{Needs, Quantizer};

use crate::{Batch, Blocks, Error, Result};

/// The choice of a quantizer for each projection. A [`Quantizer`] is the recipe that chooses itself for
/// all of them.
///
/// # Examples
/// ```
/// use peft::{PerLayer, Recipe};
/// use quant_core::Rtn;
///
/// assert!(Rtn::new().quantizer("model.layers.0.mlp.up_proj").is_some());
/// let mut recipe = PerLayer::default();
/// recipe.0.insert("up".into(), Box::new(Rtn::new().with_bits(3)));
/// assert!(recipe.quantizer("down").is_none());
/// let error = peft::check_paths(&recipe, &["down".into()]).unwrap_err();
/// assert_eq!(error.to_string(), "the model has no projection `up`, which the recipe names");
/// ```
pub trait Recipe {
    /// The quantizer of the layer at `path`; none leaves it dense.
    fn quantizer(&self, path: &str) -> Option<&dyn Quantizer>;

    /// The layers that it names, which the model must have; empty for a recipe that names none.
    fn paths(&self) -> Vec<&str> {
        Vec::new()
    }
}

impl<Q: Quantizer> Recipe for Q {
    fn quantizer(&self, _: &str) -> Option<&dyn Quantizer> {
        Some(self)
    }
}

/// A quantizer for each layer by its path, such as from [`quant_core::allocate`]. Layers that are not
/// listed stay dense.
#[derive(Default)]
pub struct PerLayer(pub BTreeMap<String, Box<dyn Quantizer>>);

impl Recipe for PerLayer {
    fn quantizer(&self, path: &str) -> Option<&dyn Quantizer> {
        self.0.get(path).map(Box::as_ref)
    }

    fn paths(&self) -> Vec<&str> {
        self.0.keys().map(String::as_str).collect()
    }
}

/// Checks layers, formats and calibration, and returns the needs of the recipe.
///
/// # Errors
/// [`Error::NoLayer`] if the recipe names a layer that the model lacks, an error for a layer that is
/// quantized or adapted already or that its format does not fit, [`Error::NoCalibration`],
/// [`Error::RepeatedCalibration`], or as [`Batch::check`].
pub fn check_recipe<M: Blocks>(
    model: &M,
    recipe: &(impl Recipe + ?Sized),
    calibration: &[Batch],
) -> Result<Needs> {
    let mut needs = Needs::Nothing;
    let layers: Vec<String> = model.linears().into_iter().map(|(path, _)| path).collect();
    check_paths(recipe, &layers)?;
    for (path, linear) in model.linears() {
        let Some(quantizer) = recipe.quantizer(&path) else {
            continue;
        };
        linear.check_plain(&path)?;
        let layout = quantizer
            .format()
            .and_then(|format| format.layout(linear.weight().dims()));
        layout.map_err(|source| Error::Quant { path, source })?;
        needs = needs.max(quantizer.needs());
    }
    for batch in calibration {
        batch.check(model)?;
    }
    check_calibration(calibration, needs)?;
    Ok(needs)
}

/// Checks that there is a calibration where one is needed, and that its sequences differ.
///
/// # Errors
/// [`Error::NoCalibration`], [`Error::RepeatedCalibration`].
pub fn check_calibration(calibration: &[Batch], needs: Needs) -> Result<()> {
    if calibration.is_empty() && needs > Needs::Nothing {
        return Err(Error::NoCalibration);
    }
    check_variety(calibration)
}

/// Refuses a calibration whose sequences are all the same: together they hold no more than one.
fn check_variety(calibration: &[Batch]) -> Result<()> {
    let mut first: Option<Vec<i64>> = None;
    let mut n = 0;
    for batch in calibration {
        let seq = batch.tokens().dims()[1];
        let tokens = batch.tokens().into_data().convert::<i64>();
        let tokens = tokens.as_slice::<i64>().expect("converted to i64");
        for sequence in tokens.chunks_exact(seq) {
            n += 1;
            match &first {
                None => first = Some(sequence.to_vec()),
                Some(first) if first == sequence => {}
                Some(_) => return Ok(()),
            }
        }
    }
    match n {
        0 | 1 => Ok(()),
        n => Err(Error::RepeatedCalibration { n }),
    }
}

/// Checks that a model of these layers has those that the recipe names.
///
/// # Errors
/// [`Error::NoLayer`] with the first that is not there.
pub fn check_paths(recipe: &(impl Recipe + ?Sized), layers: &[String]) -> Result<()> {
    let named = recipe.paths();
    match named
        .into_iter()
        .find(|path| !layers.iter().any(|layer| layer == path))
    {
        Some(path) => Err(Error::NoLayer { path: path.into() }),
        None => Ok(()),
    }
}
