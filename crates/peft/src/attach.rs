use std::collections::BTreeMap;

use burn::module::Module;

use crate::trainable::trainable_outside;
use crate::{Adapters, Error, Linears, Method, Result};

/// The result of [`attach`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// The paths of the adapted layers.
    pub paths: Vec<String>,
    /// The number of trainable parameters of all adapters.
    pub n_trainable: usize,
    /// The number of those outside of adapters, which would be trained and are no part of them: 0 after
    /// [`freeze_base`](crate::freeze_base).
    pub n_trainable_outside: usize,
}

/// Attaches a fresh adapter, which changes no output, to each layer that `method` targets.
///
/// Parameters outside of adapters stay trainable or frozen as they are; they are counted.
///
/// # Errors
/// [`Error::NoTarget`] if a target matches no layer, [`Error::AlreadyAdapted`] if a layer has an
/// adapter, and those of [`Method::init`]. The model is then unchanged.
///
/// # Panics
/// If [`Method::init_all`] returns another number of adapters than there are layers.
///
/// # Examples
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use peft::{Error, Linear, Linears, Lora, Weight};
///
/// # #[derive(burn::module::Module, Debug)]
/// # struct Layer {
/// #     proj: Linear,
/// # }
/// #
/// # impl Linears for Layer {
/// #     fn linears(&self) -> Vec<(String, &Linear)> {
/// #         vec![("proj".into(), &self.proj)]
/// #     }
/// #
/// #     fn linears_mut(&mut self) -> Vec<(String, &mut Linear)> {
/// #         vec![("proj".into(), &mut self.proj)]
/// #     }
/// # }
///
/// let weight = Weight::frozen(Tensor::ones([4, 6], &Device::flex()));
/// let mut model = Layer { proj: Linear::new(weight, None) };
/// let attached = peft::attach(&mut model, &Lora::new(2))?;
/// assert_eq!(attached.n_trainable, 4 * 2 + 2 * 6);
/// let error = peft::attach(&mut model, &Lora::new(2)).unwrap_err();
/// assert!(matches!(error, Error::AlreadyAdapted { path } if path == "proj"));
/// # Ok::<(), Error>(())
/// ```
pub fn attach<M: Linears>(model: &mut M, method: &(impl Method + ?Sized)) -> Result<Attached> {
    let paths = method.targets().paths(model)?;
    let mut layers = model.linears();
    layers.retain(|(path, _)| paths.contains(path));
    if let Some((path, _)) = layers.iter().find(|(_, linear)| linear.adapter.is_some()) {
        return Err(Error::AlreadyAdapted { path: path.clone() });
    }
    let fresh = method.init_all(&layers)?;
    assert_eq!(fresh.len(), layers.len(), "`init_all`: one adapter a layer");
    let mut adapters = BTreeMap::new();
    for ((path, linear), adapter) in layers.iter().zip(fresh) {
        adapter.check(path, linear)?;
        adapters.insert(path.clone(), adapter.bound_to(&linear.weight));
    }
    let n_trainable = adapters.values().map(Module::num_params).sum();
    for (path, linear) in model.linears_mut() {
        if let Some(adapter) = adapters.remove(&path) {
            linear.adapter = Some(adapter);
        }
    }
    let outside = trainable_outside(model).into_iter();
    Ok(Attached {
        paths,
        n_trainable,
        n_trainable_outside: outside.map(|(_, n)| n).sum(),
    })
}

/// Detaches all adapters from the model, which is then the base, and returns them.
///
/// # Errors
/// As [`Adapters::of`].
pub fn detach<M: Linears>(model: &mut M) -> Result<Adapters> {
    let adapters = Adapters::of(model)?;
    for (_, linear) in model.linears_mut() {
        linear.adapter = None;
    }
    Ok(adapters)
}

/// Replaces all adapters of the model by `adapters`, and returns the former ones.
///
/// # Errors
/// [`Error::OtherBase`] if the adapters are for another base, [`Error::UnknownLayer`],
/// [`Error::Shape`], [`Error::NoBias`] or another error if one does not fit its layer. The model is
/// then unchanged.
///
/// # Examples
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use peft::{Error, Linear, Linears, Lora, Weight};
///
/// # #[derive(burn::module::Module, Debug)]
/// # struct Layer {
/// #     proj: Linear,
/// # }
/// #
/// # impl Linears for Layer {
/// #     fn linears(&self) -> Vec<(String, &Linear)> {
/// #         vec![("proj".into(), &self.proj)]
/// #     }
/// #
/// #     fn linears_mut(&mut self) -> Vec<(String, &mut Linear)> {
/// #         vec![("proj".into(), &mut self.proj)]
/// #     }
/// # }
///
/// let layer = |value: f32| {
///     let weight = Weight::frozen(Tensor::full([4, 6], value, &Device::flex()));
///     Layer { proj: Linear::new(weight, None) }
/// };
/// let mut model = layer(1.0);
/// peft::attach(&mut model, &Lora::new(2))?;
/// let task = peft::detach(&mut model)?;
/// let none = peft::activate(&mut model, &task)?;
/// assert_eq!(none.layers().count(), 0);
/// let error = peft::activate(&mut layer(2.0), &task).unwrap_err();
/// assert!(matches!(error, Error::OtherBase { .. }));
/// # Ok::<(), Error>(())
/// ```
pub fn activate<M: Linears>(model: &mut M, adapters: &Adapters) -> Result<Adapters> {
    adapters.check_base(model)?;
    for (path, adapter) in &adapters.layers {
        let linears = model.linears();
        let Some((_, linear)) = linears.iter().find(|(other, _)| other == path) else {
            return Err(Error::UnknownLayer { path: path.clone() });
        };
        adapter.check(path, linear)?;
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
