//! The parameters that train: which they are, and their values by path.

use std::collections::BTreeMap;

use burn::module::{Module, Param, ParamId};
use burn::tensor::{DType, Device, Tensor, TensorData};
use sha2::{Digest, Sha256};
use tensor_files::{FloatType, LazyTensor, TensorFile};

use crate::trained::{Change, Look, change_trained, look_at_trained};
use crate::{Error, Result};

/// A parameter that trains.
pub(super) struct Trained {
    pub(super) id: ParamId,
    pub(super) dims: Vec<usize>,
    pub(super) dtype: DType,
    /// Where its value is, without gradients.
    pub(super) device: Device,
}

impl Trained {
    pub(super) fn n_elements(&self) -> usize {
        self.dims.iter().product()
    }

    /// # Errors
    /// [`tensor_files::Error::Tensor`] if a tensor of a file has another number of values.
    pub(super) fn check_len(
        &self,
        file: &TensorFile,
        tensor: &str,
        n: usize,
    ) -> Result<(), tensor_files::Error> {
        if n == self.n_elements() {
            return Ok(());
        }
        let problem = format!("has {n} values, not {}", self.n_elements());
        Err(file.refuse(tensor, problem))
    }
}

/// The parameters that train, by their paths.
pub(super) struct Parameters(pub(super) BTreeMap<String, Trained>);

impl Parameters {
    /// Those of a model.
    ///
    /// # Errors
    /// [`Error::NothingToTrain`] without any, [`Error::TrainsIn16Bits`] for one that does not hold small
    /// steps.
    pub(super) fn of<M: Module>(model: &M) -> Result<Self> {
        let mut found = Found(BTreeMap::new());
        look_at_trained(model, &mut found);
        if found.0.is_empty() {
            return Err(Error::NothingToTrain);
        }
        let is_short = |trained: &Trained| matches!(trained.dtype, DType::F16 | DType::BF16);
        match found.0.iter().find(|(_, trained)| is_short(trained)) {
            None => Ok(Self(found.0)),
            Some((path, trained)) => Err(Error::TrainsIn16Bits {
                path: path.clone(),
                found: trained.dtype,
            }),
        }
    }
}

struct Found(BTreeMap<String, Trained>);

impl Look for Found {
    fn look<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
        let value = param.val();
        let trained = Trained {
            id: param.id,
            dims: value.dims().into(),
            dtype: value.dtype(),
            device: value.inner().device(),
        };
        self.0.insert(path.into(), trained);
    }
}

/// The values of trained parameters, or of what belongs to one, row by row, by path.
#[derive(Clone, Debug, Default)]
pub(super) struct Values(pub(super) BTreeMap<String, Tensor<1>>);

impl Values {
    /// Those of a model, whose memory they share.
    pub(super) fn of<M: Module>(model: &M) -> Self {
        let mut values = Self::default();
        look_at_trained(model, &mut values);
        values
    }

    /// The model with these values.
    pub(super) fn put_into<M: Module>(mut self, model: M) -> M {
        change_trained(model, &mut self)
    }

    /// The SHA-256 of their bits.
    pub(super) fn sha256(&self) -> [u8; 32] {
        let mut sha256 = Sha256::new();
        for (path, values) in &self.0 {
            sha256.update(path);
            sha256.update(values.to_data().as_bytes());
        }
        sha256.finalize().into()
    }

    /// The tensors of a file, called by `part` and the path.
    pub(super) fn tensors(&self, part: &str) -> Vec<(String, LazyTensor<'_>)> {
        let tensors = self.0.iter();
        tensors
            .map(|(path, values)| (format!("{part}.{path}"), floats(values)))
            .collect()
    }

    /// Reads what [`Values::tensors`] wrote, for all parameters.
    ///
    /// # Errors
    /// [`tensor_files::Error`] if the file does not have one, another number of values than the parameter,
    /// or one that is not finite.
    pub(super) fn read(
        file: &mut TensorFile,
        part: &str,
        parameters: &Parameters,
    ) -> Result<Self, tensor_files::Error> {
        let values = parameters.0.iter().map(|(path, trained)| {
            let values = read_floats(file, &format!("{part}.{path}"), trained)?;
            Ok((path.clone(), values))
        });
        Ok(Self(values.collect::<Result<_, _>>()?))
    }
}

/// Values of `f32`, row by row, to be written.
pub(super) fn floats(values: &Tensor<1>) -> LazyTensor<'_> {
    let [n] = values.dims();
    LazyTensor::floats_as(FloatType::F32, [n], || {
        let data = values.clone().into_data().convert::<f32>();
        data.try_into_vec().expect("converted to f32")
    })
}

/// The values of a parameter, or of a state of its size, that [`floats`] wrote.
pub(super) fn read_floats(
    file: &mut TensorFile,
    tensor: &str,
    trained: &Trained,
) -> Result<Tensor<1>, tensor_files::Error> {
    let (values, [n]) = file.floats::<1>(tensor)?;
    trained.check_len(file, tensor, n)?;
    let place = (&trained.device, DType::F32);
    Ok(Tensor::from_data(TensorData::new(values, [n]), place))
}

impl Look for Values {
    fn look<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
        let value = param.val().inner();
        let n = value.shape().num_elements();
        self.0.insert(path.into(), value.reshape([n]));
    }
}

impl Change for Values {
    fn change<const D: usize>(&mut self, path: &str, _: ParamId, value: Tensor<D>) -> Tensor<D> {
        match self.0.remove(path) {
            Some(values) => values.reshape(value.dims()),
            None => value,
        }
    }
}
