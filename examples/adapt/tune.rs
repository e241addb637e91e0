//! One base: quantized, tuned, merged, saved, reloaded and compared.

use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::module::Module;
use burn::tensor::Device;
use examples::format::FormatName;
use examples::method::Settings;
use examples::outcome::{self, Result, bits, max_difference, save_as, weights_bytes};
use examples::progress::Bar;
use examples::texts::Texts;
use examples::training::Watch;
use examples::{eprintln, interrupt, memory, println};
use models::{Plan, Pretrained};
use peft::{
    Adapters, Certificate, Checkpoints, Evaluation, FitConfig, FitEnd, FitReport, Group, Linears,
    MergeConfig, OffGrid, PerLayer, Recipe,
};
use quant_core::{Format, Grid, Needs, NormalFloat, Quantizer, Rtn};
use serde_json::Value;

use crate::place::{Done, Place, training};
use crate::rate::{self, Rate};
use crate::report::Run;
use crate::{Args, Merge, Merging};

/// A base to tune.
pub(crate) struct Base {
    /// The directory that is loaded.
    pub(crate) source: PathBuf,
    /// How its weights are packed: by the settings' quantizer, or already.
    pub(crate) is_packed: bool,
    /// The formats of its layers once they are packed.
    pub(crate) plan: Plan,
    pub(crate) settings: Settings,
    /// What the merge changes.
    pub(crate) merging: Merging,
    /// The adapters to go on from.
    pub(crate) adapters: Option<Adapters>,
}

/// The formats of the packed layers, each once.
pub(crate) fn formats(plan: &Plan) -> String {
    let mut formats: Vec<String> = Vec::new();
    for format in plan.layers.iter().filter_map(|layer| layer.format) {
        let format = format.to_string();
        if !formats.contains(&format) {
            formats.push(format);
        }
    }
    formats.join("; ")
}

/// Quantizers of the formats that the packed layers have.
fn quantizers(plan: &Plan, f16_scales: bool) -> PerLayer {
    let packed = plan.layers.iter();
    let packed = packed.filter_map(|layer| Some((layer.path.clone(), layer.format?)));
    let quantizer = |(path, format): (String, Format)| {
        let quantizer: Box<dyn Quantizer> = if format.grid().is_codebook() {
            let nf = match format.grid() {
                Grid::Float4 => NormalFloat::float4(),
                _ => NormalFloat::new().with_bits(format.bits()),
            };
            let nf = nf.with_block_size(format.group_size());
            Box::new(nf.with_double_quant(format.double_quant()))
        } else {
            let rtn = Rtn::new().with_bits(format.bits());
            let rtn = rtn.with_group_size(format.group_size());
            let rtn = rtn.with_symmetric(format.grid() == Grid::Symmetric);
            Box::new(rtn.with_f16_scales(f16_scales))
        };
        (path, quantizer)
    };
    PerLayer(packed.map(quantizer).collect())
}

/// The name of the results of a base.
pub(crate) fn name(plan: &Plan) -> String {
    match plan.layers.iter().find_map(|layer| layer.format) {
        Some(format) => format!("{}-bit", format.bits()),
        None => "dense".into(),
    }
}

/// Quantizes, tunes, merges, saves, reloads and compares. Of several processes, the first one saves, and the
/// others have no result.
pub(crate) fn tune(
    args: &Args,
    base: &Base,
    texts: &Texts,
    place: &Place,
    group: &dyn Group,
    device: &Device,
) -> Result<Option<Done>> {
    memory::reset_peak();
    let start = Instant::now();
    let Settings {
        quantizer, method, ..
    } = &base.settings;
    let formats = formats(&base.plan);
    let name = name(&base.plan);
    let name_of_adapters = format!("{name}-adapters");
    place.clear(&name)?;
    let mut lm = {
        let _bar = Bar::unmeasured("loading")?;
        models::load_as(&base.source, device, args.model.dtype.float())?
    };
    // Quantized or tuned, it is another model.
    lm.certificate = None;
    let weight_error = if base.is_packed {
        None
    } else {
        let error = quantize(&mut lm, quantizer, texts, args.tune.batch)?;
        args.check_base(&lm, base.merging)?;
        Some(error)
    };
    let rounded = texts.perplexities(&lm.model)?;

    let n_trainable = match &base.adapters {
        None => peft::attach(&mut lm.model, &**method)?.n_trainable,
        Some(adapters) => {
            peft::activate(&mut lm.model, adapters)?;
            let trained = adapters.layers();
            trained.map(|(_, of)| Module::num_params(of)).sum()
        }
    };
    let method = methods(&lm);
    let mut config = base.settings.fit.clone();
    if args.lr == Some(Rate::Auto) {
        let rate = place.rate(&name, || rate::choose(&lm.model, texts, &config))?;
        config = config.with_learning_rate(rate);
    }
    // A step has a batch for each process.
    let config = config.with_accumulation(group.size());
    let config = config.with_checkpoint_blocks(args.tune.checkpoint_blocks);
    let fitted = fit(args, base, &config, texts, place, group, &mut lm)?;
    if group.rank() > 0 {
        return Ok(None);
    }
    if let Some(best) = fitted.best {
        println!(
            "{formats}: best evaluation after step {}: perplexity {:.3}",
            best.step,
            best.loss.exp()
        );
    }
    let bar = Bar::unmeasured("saving the adapters")?;
    let adapters = Adapters::of(&lm.model)?;
    let dir_of_adapters = place.files().join(&name_of_adapters);
    interrupt::uninterrupted(|| adapters.save(&dir_of_adapters))?;
    drop(bar);
    let tuned = texts.perplexities(&lm.model)?;
    let bar = Bar::unmeasured("merging and saving")?;
    let tuned_logits = texts.probe(&lm.model);
    let certificate = merge(args, base, texts, &mut lm)?;
    let merged_logits = match &certificate {
        Some(_) => texts.probe(&lm.model),
        None => tuned_logits.clone(),
    };
    lm.certificate = certificate.clone();
    let output = interrupt::reserve(&place.files().join(&name))?;
    let (saved, refusal) = save_as(&lm, output, args.format.format())?;
    drop(lm);
    drop(bar);

    let bar = Bar::unmeasured("reloading")?;
    let mut lm = models::load_verified(&saved, device)?;
    lm.model = lm.model.with_compute(args.model.dtype.float())?;
    if certificate.is_none() {
        peft::activate(&mut lm.model, &Adapters::load(&dir_of_adapters, device)?)?;
    }
    drop(bar);
    let reloaded = texts.perplexities(&lm.model)?;
    let reloaded_logits = texts.probe(&lm.model);
    let max_logit_difference = max_difference(&merged_logits, &tuned_logits);
    let largest = tuned_logits
        .iter()
        .fold(0.0, |most: f32, logit| most.max(logit.abs()));
    let is_other = certificate.as_ref().is_some_and(|certificate| {
        let tolerated = args.tolerated_difference(certificate) * largest;
        certificate.kind() != "rounded" && max_logit_difference > tolerated
    });
    if is_other || bits(&reloaded_logits) != bits(&merged_logits) {
        return Err(format!(
            "{formats}: the logits of the reloaded model are not the tuned model's"
        )
        .into());
    }
    let packed = base.plan.layers.iter().find_map(|layer| layer.format);
    let run = Run {
        method,
        group_size: packed.and_then(|format| format.group_size()),
        saved_as: match refusal {
            None => args.format,
            Some(_) => FormatName::QuantCore,
        },
        n_bytes: weights_bytes(&saved)?
            + match &certificate {
                Some(_) => 0,
                None => weights_bytes(&dir_of_adapters)?,
            },
        n_trainable,
        settings: settings(&dir_of_adapters)?,
        fit: config,
        weight_error,
        rounded,
        losses: fitted.steps.iter().map(|step| step.loss).collect(),
        resumed_from: fitted.resumed_from,
        best: fitted.best,
        is_ended_early: fitted.end == FitEnd::Patience,
        warnings: fitted.warnings.iter().map(ToString::to_string).collect(),
        tuned,
        reloaded,
        certificate,
        n_logits: tuned_logits.len(),
        max_logit_difference,
        seconds: start.elapsed().as_secs_f64(),
        peak_bytes: memory::peak_bytes(),
        formats,
    };
    let error = run.weight_error.map_or(String::new(), |error| {
        format!("relative weight error {:.1} %, ", 100.0 * error)
    });
    println!(
        "{}: {error}task perplexity {:.3}, tuned {:.3}",
        run.formats, run.rounded.task, run.tuned.task
    );
    Ok(Some(Done {
        run,
        refusal: refusal.map(|refusal| refusal.to_string()),
    }))
}

/// Trains the adapters, with a bar, files, and checkpoints if they are kept.
fn fit(
    args: &Args,
    base: &Base,
    config: &FitConfig,
    texts: &Texts,
    place: &Place,
    group: &dyn Group,
    lm: &mut Pretrained,
) -> Result<FitReport> {
    let name = name(&base.plan);
    let dir = place.files().join(training(&name));
    let checkpoints = place.checkpoints(&name).map(|dir| {
        let checkpoints = Checkpoints::new(dir).with_every(args.checkpoint_every);
        // That there are some was found when the place was opened.
        checkpoints.with_resume(true)
    });
    let evaluation = args.eval_every.map(|every| {
        Evaluation::new(texts.task.clone())
            .with_every(every)
            .with_patience(args.patience)
            .with_restore_best(args.patience.is_some())
    });
    let config = config.clone().with_checkpoints(checkpoints);
    let config = config.with_evaluation(evaluation);
    let formats = formats(&base.plan);
    let mut watch = Watch::new(formats.clone(), args.tune.steps, &texts.train, Some(dir))?;
    let mut fit = || {
        peft::fit_in(
            &mut lm.model,
            &texts.train,
            &config,
            group,
            |_, training| watch.step(training.steps()),
        )
    };
    let fitted = if place.is_kept() {
        interrupt::on_end(&format!(
            "stopped; go on with\n{}",
            outcome::resume_command(group.size())
        ));
        // A signal waits for the step, and for the checkpoint.
        interrupt::uninterrupted(fit)
    } else {
        fit()
    };
    interrupt::wait_if_ending();
    let fitted = fitted?;
    let title = format!("{}, {formats}: {}", args.model.name(), methods(lm));
    watch.finish(&title, &fitted.steps)?;
    for warning in &fitted.warnings {
        eprintln!("warning: {warning}");
    }
    Ok(fitted)
}

/// Merges the adapters, or takes them away if they do not merge into packed weights.
fn merge(
    args: &Args,
    base: &Base,
    texts: &Texts,
    lm: &mut Pretrained,
) -> Result<Option<Certificate>> {
    let again = quantizers(&base.plan, args.format.f16_scales());
    let recipe: &dyn Recipe = if base.is_packed {
        &again
    } else {
        &base.settings.quantizer
    };
    let mut merge = MergeConfig::new().with_off_grid(match args.merge {
        Merge::Codes => OffGrid::Refuse,
        Merge::Dense => OffGrid::Dense,
        Merge::Round => OffGrid::Round(recipe),
    });
    if args.allow_rounding {
        merge = merge.with_stored_grid(args.format.format().stored_grid());
    }
    match peft::merge_probed(&mut lm.model, merge, &texts.task[0]) {
        Ok(certificate) => Ok(Some(certificate)),
        Err(peft::Error::MergeIntoPacked { .. }) => {
            peft::detach(&mut lm.model)?;
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

/// The settings of saved adapters, each once.
fn settings(dir: &Path) -> Result<Vec<Value>> {
    let config: Value = tensor_files::read_json(&dir.join("adapter_config.json"))?;
    let mut settings: Vec<Value> = Vec::new();
    for layer in config["layers"].as_object().into_iter().flatten() {
        if !settings.contains(layer.1) {
            settings.push(layer.1.clone());
        }
    }
    Ok(settings)
}

/// Quantizes the model, and returns the mean over its layers of the relative error of a weight.
fn quantize(
    lm: &mut Pretrained,
    quantizer: &dyn Quantizer,
    texts: &Texts,
    batch: usize,
) -> Result<f64> {
    let calibration = match quantizer.needs() {
        Needs::Nothing => &[],
        _ => {
            let n = CALIBRATION_WINDOWS.div_ceil(batch);
            &texts.train[..n.min(texts.train.len())]
        }
    };
    let bar = Bar::new("quantizing", lm.model.linears().len(), "layers")?;
    let layers = models::quantize(&mut lm.model, &quantizer, calibration, |_| bar.step(""))?;
    drop(bar);
    let errors = layers.iter().map(|layer| layer.error.weight.relative);
    Ok(errors.sum::<f64>() / layers.len() as f64)
}

/// The windows or rows of the training data that the quantizer of a preset is calibrated on, at most.
const CALIBRATION_WINDOWS: usize = 128;

/// The methods of the adapters of a model.
fn methods(lm: &Pretrained) -> String {
    let linears = lm.model.linears();
    let mut names: Vec<&str> = (linears.iter())
        .filter_map(|(_, linear)| Some(linear.adapter()?.method()))
        .collect();
    names.sort_unstable();
    names.dedup();
    names.join(", ")
}
