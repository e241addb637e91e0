use std::collections::BTreeMap;

use burn::module::Module;

use crate::{Adapters, Error, Linears, Method, Result};

/// What [`attach`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// The adapted layers.
    pub paths: Vec<String>,
    /// Trainable parameters of all adapters.
    pub n_trainable: usize,
}

/// Gives each layer that `method` targets a fresh adapter, which changes no output.
///
/// # Errors
/// [`Error::NoTarget`] if a target matches no layer, [`Error::AlreadyAdapted`] if one has an
/// adapter, or what the method has against a weight. Then the model is as it was.
pub fn attach<M: Linears>(model: &mut M, method: &(impl Method + ?Sized)) -> Result<Attached> {
    let paths = method.targets().paths(model)?;
    let mut layers = model.linears();
    layers.retain(|(path, _)| paths.contains(path));
    if let Some((path, _)) = layers.iter().find(|(_, linear)| linear.adapter.is_some()) {
        return Err(Error::AlreadyAdapted { path: path.clone() });
    }
    let mut adapters = BTreeMap::new();
    for ((path, linear), adapter) in layers.iter().zip(method.init_all(&layers)?) {
        adapter.ops().check(path, linear)?;
        adapters.insert(path.clone(), adapter.bound_to(&linear.weight));
    }
    let n_trainable = adapters.values().map(Module::num_params).sum();
    for (path, linear) in model.linears_mut() {
        if let Some(adapter) = adapters.remove(&path) {
            linear.adapter = Some(adapter);
        }
    }
    Ok(Attached { paths, n_trainable })
}

/// Takes all adapters off the model, which is the base then, and returns them.
///
/// # Errors
/// [`Error::NoAdapters`] if it wears none.
pub fn detach<M: Linears>(model: &mut M) -> Result<Adapters> {
    let adapters = Adapters::of(model)?;
    for (_, linear) in model.linears_mut() {
        linear.adapter = None;
    }
    Ok(adapters)
}

/// Puts `adapters` in the place of all that the model has, and returns those.
///
/// # Errors
/// [`Error::OtherBase`] unless the adapters were made for this base, [`Error::UnknownLayer`],
/// [`Error::Shape`], [`Error::NoBias`] or what else one has against its layer. Then the model is as it
/// was.
pub fn activate<M: Linears>(model: &mut M, adapters: &Adapters) -> Result<Adapters> {
    adapters.check_base(model)?;
    for (path, adapter) in &adapters.layers {
        let linears = model.linears();
        let Some((_, linear)) = linears.iter().find(|(other, _)| other == path) else {
            return Err(Error::UnknownLayer { path: path.clone() });
        };
        adapter.ops().check(path, linear)?;
    }
    let mut before = Adapters {
        base: adapters.base.clone(),
        layers: Default::default(),
    };
    for (path, linear) in model.linears_mut() {
        let adapter = adapters.layers.get(&path).cloned();
        let adapter = adapter.map(|adapter| adapter.bound_to(&linear.weight));
        if let Some(adapter) = std::mem::replace(&mut linear.adapter, adapter) {
            before.layers.insert(path, adapter);
        }
    }
    Ok(before)
}
