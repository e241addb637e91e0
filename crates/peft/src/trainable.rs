use burn::module::Param;
use burn::tensor::Tensor;

use crate::trained::{Look, look_at_trained};
use crate::{Error, Linears, Result};

/// Freezes all parameters outside of adapters.
///
/// `Module::freeze` of burn freezes the adapters too. Buffers that a forward pass updates, such as the
/// statistics of a batch norm, are no parameters.
///
/// burn's own modules are trainable when they are made: [`fit`](crate::fit()) would tune the norms, the
/// embedding and the head of a model that is built from them along with the adapters, which do not hold
/// them. [`attach`](crate::attach()) counts such parameters.
///
/// A head that is trained beside the adapters belongs to the base. Once it is trained, freeze it, take the
/// adapters, and save the base with it, whole ([`Formats`](crate::Formats)) or its part
/// (`Module::into_record_group`).
///
/// # Examples
/// ```
/// use burn::module::Param;
/// use burn::tensor::{Device, Tensor};
/// use peft::{Adapters, Error, Linear, Linears, Lora, Weight};
///
/// #[derive(burn::module::Module, Debug)]
/// struct Classifier {
///     proj: Linear,
///     head: Param<Tensor<2>>,
/// }
///
/// # impl Linears for Classifier {
/// #     fn linears(&self) -> Vec<(String, &Linear)> {
/// #         vec![("proj".into(), &self.proj)]
/// #     }
/// #
/// #     fn linears_mut(&mut self) -> Vec<(String, &mut Linear)> {
/// #         vec![("proj".into(), &mut self.proj)]
/// #     }
/// # }
/// #
/// let device = Device::flex();
/// let mut model = Classifier {
///     proj: Linear::new(Weight::frozen(Tensor::ones([4, 4], &device)), None),
///     head: Param::from_tensor(Tensor::ones([4, 2], &device)),
/// };
/// let attached = peft::attach(&mut model, &Lora::new(1))?;
/// assert_eq!((attached.n_trainable, attached.n_trainable_outside), (8, 8));
/// // The adapters would be saved without the head that they were trained with.
/// let error = Adapters::of(&model).unwrap_err();
/// assert!(matches!(error, Error::TrainableOutside { parameters } if parameters == ["head"]));
///
/// peft::freeze_base(&mut model);
/// assert!(Adapters::of(&model).is_ok());
/// # Ok::<(), Error>(())
/// ```
pub fn freeze_base<M: Linears>(model: &mut M) {
    let mut frozen = model.clone();
    let taken = frozen.linears_mut().into_iter();
    let taken: Vec<_> = taken.map(|(_, linear)| linear.adapter.take()).collect();
    frozen = frozen.no_grad();
    for ((_, linear), adapter) in frozen.linears_mut().into_iter().zip(taken) {
        linear.adapter = adapter;
    }
    *model = frozen;
}

/// The trainable parameters outside of adapters with their numbers of elements.
pub(crate) fn trainable_outside(model: &impl Linears) -> Vec<(String, usize)> {
    let mut base = model.clone();
    for (_, linear) in base.linears_mut() {
        linear.adapter = None;
    }
    let mut trainable = Trainable::default();
    // A parameter on a plain device shows its setting when training begins.
    look_at_trained(&base.train(), &mut trainable);
    trainable.found
}

/// Checks that adapters hold all that trains.
///
/// # Errors
/// [`Error::TrainableOutside`].
pub(crate) fn check_frozen(model: &impl Linears) -> Result<()> {
    let found = trainable_outside(model);
    if found.is_empty() {
        return Ok(());
    }
    let parameters = found.into_iter().map(|(name, _)| name).collect();
    Err(Error::TrainableOutside { parameters })
}

#[derive(Default)]
struct Trainable {
    found: Vec<(String, usize)>,
}

impl Look for Trainable {
    fn look<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
        let n = param.val().shape().num_elements();
        self.found.push((path.into(), n));
    }
}
