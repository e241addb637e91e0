use peft::{Linears, Weight};
use tensor_files::{FloatType, IntoOutput};

use super::directory::Files;
use super::format::{Layers, Refusals};
use super::gguf;
use super::kind::CheckpointFormat;
use super::parameters::{Parameter, check_no_adapters, parameters, state_float, state_head};
use crate::source::HEAD;
use crate::{CheckpointError, Model, Pretrained, Result};

/// Saves a model to a new directory, from which [`load`](crate::load) reads it back bit for bit.
///
/// The directory, a path or a reserved [`Output`](tensor_files::Output), is written completely or not at
/// all. Packed layers are in the format of this
/// workspace; see [`save_as`]. Adapters are not written: merge them, or save them with
/// [`peft::Adapters`].
///
/// `certificate.json` has the certificate of the model, if there is one, and `SHA256SUMS` the sums of
/// all files, which [`load_verified`](crate::load_verified) and `sha256sum --check` read. The files are
/// read once for their sums.
///
/// # Errors
/// [`tensor_files::Error::OutputExists`] if `dir` holds something, [`peft::Error::AlreadyAdapted`] if a
/// layer has an adapter, [`CheckpointError::OtherCertificate`] if the certificate is for another model,
/// [`tensor_files::Error::Io`] if the directory cannot be written.
pub fn save(lm: &Pretrained, dir: impl IntoOutput) -> Result<()> {
    save_as(lm, dir, CheckpointFormat::QuantCore)
}

/// Saves a model as [`save`] does, with the packed layers in a format of other programs.
///
/// Nothing is rounded: a model that would not be read back bit for bit is refused.
///
/// # Errors
/// [`CheckpointError::CannotHold`] with all layers that the format does not hold exactly; otherwise
/// as [`save`].
///
/// # Examples
/// ```no_run
/// use models::{CheckpointFormat, GptqVersion};
/// use quant_core::Rtn;
///
/// let mut lm = models::load("Llama-2-7b-hf", &burn::tensor::Device::flex())?;
/// let rtn = Rtn::new().with_group_size(128).with_f16_scales(true);
/// models::quantize(&mut lm.model, &rtn, &[], |_| {})?;
/// models::save_as(&lm, "Llama-2-7b-gptq", CheckpointFormat::Gptq(GptqVersion::V2))?;
/// // Affine grids are no NormalFloat.
/// assert!(models::save_as(&lm, "Llama-2-7b-nf4", CheckpointFormat::Bitsandbytes).is_err());
/// # Ok::<(), models::Error>(())
/// ```
pub fn save_as(lm: &Pretrained, dir: impl IntoOutput, format: CheckpointFormat) -> Result<()> {
    let model = &lm.model;
    check_no_adapters(model)?;
    if let Some(certificate) = &lm.certificate {
        let verified = certificate.verify(model);
        verified.map_err(|source| CheckpointError::OtherCertificate { source })?;
    }
    check_format(lm, format)?;
    if format == CheckpointFormat::Gguf {
        return gguf::save(lm, dir);
    }
    let mut config = lm.config.clone();
    let all = Layers::of(model);
    let is_packed = all.is_packed();
    let layers = format.for_layers(&all, &config);
    let quantization = is_packed.then(|| layers.config());
    if let Some(quantization) = &quantization {
        config.insert("quantization_config".into(), quantization.clone());
    }
    state_head(&mut config, model.lm_head.is_some());

    let parameters = parameters(model);
    let holding: Vec<_> = parameters.iter().map(Parameter::holding).collect();
    // One type for all floats of a dense model, because readers assume it.
    let shorter = [FloatType::Bf16, FloatType::F16].into_iter();
    let mut common = shorter.filter(|float| holding.iter().all(|all| all.contains(float)));
    let common = common.next().filter(|_| !is_packed);
    if !is_packed {
        state_float(&mut config, common.unwrap_or(FloatType::F32));
    }
    let tensors = parameters.into_iter().zip(holding);
    let tensors = tensors.flat_map(|(parameter, holding)| match parameter {
        Parameter::Packed { path, weight } => layers.tensors(&path, weight),
        parameter => vec![parameter.tensor(common.unwrap_or(holding[0]), |_, _| ())],
    });
    let files = Files {
        config: &config,
        carried: &lm.carried,
        second: layers.config_file().zip(quantization.as_ref()),
        certificate: lm.certificate.as_ref(),
    };
    files.write(dir, |path| Ok(tensor_files::write_tensors(path, tensors)?))
}

/// Checks that [`save_as`] can save the weights of a model in this format, without its adapters.
///
/// [`Plan::check`](crate::Plan::check) does so for a directory that is still to be quantized, as far as
/// formats tell.
///
/// # Errors
/// [`CheckpointError::CannotHold`] with all layers that the format does not hold exactly.
pub fn check_format(lm: &Pretrained, format: CheckpointFormat) -> Result<()> {
    let layers = Layers::of(&lm.model);
    let refusals = refusals(&lm.model, &layers, format);
    if refusals.is_empty() {
        return Ok(());
    }
    let holds = |other: CheckpointFormat| self::refusals(&lm.model, &layers, other).is_empty();
    let error = CheckpointError::CannotHold {
        format,
        layers: refusals,
        instead: CheckpointFormat::instead(holds),
    };
    Err(error.into())
}

/// The layers of a model that a format does not hold, for their formats or for their values.
fn refusals(model: &Model, layers: &Layers, format: CheckpointFormat) -> Refusals {
    let mut refusals = format.refusals(layers);
    let linears = model.linears().into_iter();
    let linears = linears.map(|(path, linear)| (path, linear.weight()));
    let others = model.other_weights().into_iter();
    let head_is_refused = refusals.iter().any(|(path, _)| path == HEAD);
    for (path, weight) in linears.chain(others) {
        let Weight::Quant(weight) = weight else {
            continue;
        };
        if path == HEAD && head_is_refused {
            continue;
        }
        for reason in format.reasons_against_values(weight) {
            match refusals.iter_mut().find(|(refused, _)| *refused == path) {
                Some((_, reasons)) => *reasons = format!("{reasons}; {reason}"),
                None => refusals.push((path.clone(), reason)),
            }
        }
    }
    refusals
}
