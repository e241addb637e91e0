use std::collections::BTreeMap;

use quant_core::{Needs, Quantizer};

use crate::{Batch, CausalLm, Error, Result};

/// Which quantizer each projection gets. A [`Quantizer`] is the recipe that gives itself to all.
pub trait Recipe {
    /// The quantizer of the layer at `path`; none leaves it dense.
    fn quantizer(&self, path: &str) -> Option<&dyn Quantizer>;

    /// The layers that it names, which the model must have; none if it takes what there is.
    fn paths(&self) -> Vec<&str> {
        Vec::new()
    }
}

impl<Q: Quantizer> Recipe for Q {
    fn quantizer(&self, _: &str) -> Option<&dyn Quantizer> {
        Some(self)
    }
}

/// A quantizer for each layer by its path, such as [`quant_core::allocate`] chose them. Layers that
/// are not listed stay dense.
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

/// Checks layers, formats and calibration, and says what the recipe needs of them.
///
/// # Errors
/// [`Error::NoLayer`] if the recipe names a layer that the model lacks, an error for a layer that is
/// quantized or adapted already or that its format does not fit, [`Error::NoCalibration`], or
/// [`Error::Token`] for a token that the model lacks.
pub fn check_recipe<M: CausalLm>(
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
    if calibration.is_empty() && needs > Needs::Nothing {
        return Err(Error::NoCalibration);
    }
    for batch in calibration {
        batch.check(model)?;
    }
    Ok(needs)
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
