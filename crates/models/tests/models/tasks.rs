//! Tasks of a model with its tokenizer.

use std::fs;
use std::ops::ControlFlow;

use burn::tensor::Device;
use models::{Generation, Model, Pretrained, load_verified, save};
use peft::{Batch, Fingerprint, FitConfig, Peqa, TaskPack, Tasks};
use quant_core::Rtn;

use super::fixtures::{PROBE, bits, llama, logits, tokens, write_tokenizer};

/// The text of the active task is the merged model's, and ends where the directory says. The certificate
/// is that of no other model.
#[test]
fn a_task_is_served_with_its_tokenizer() {
    let parent = tempfile::tempdir().unwrap();
    let tokenizer = parent.path().join("tokenizer.json");
    write_tokenizer(&tokenizer, 16);
    let generation = r#"{"eos_token_id": [9]}"#;
    fs::write(parent.path().join("generation_config.json"), generation).unwrap();
    let model = Model::init(llama(), 1, &Device::flex());
    let mut base = Pretrained::new(model, &tokenizer).unwrap();
    peft::freeze_base(&mut base.model);
    let rtn = Rtn::new().with_group_size(8);
    models::quantize(&mut base.model, &rtn, &[], |_| {}).unwrap();
    peft::attach(&mut base.model, &Peqa::new()).unwrap();
    base.certificate = Some(peft::merge(&mut base.model).unwrap());

    let mut merged = base.clone();
    peft::attach(&mut merged.model, &Peqa::new()).unwrap();
    let batch = Batch::new(tokens(&PROBE, 2)).unwrap();
    let config = FitConfig::new().with_learning_rate(0.3).with_steps(8);
    peft::fit(&mut merged.model, &[batch], &config, |_, _| {}).unwrap();
    let task = TaskPack::of(&merged.model).unwrap();
    merged.certificate = Some(peft::merge(&mut merged.model).unwrap());

    let mut tasks = Tasks::new(base.clone()).unwrap();
    assert_eq!(tasks.model().certificate, base.certificate);
    tasks.insert("task", task).unwrap();
    let prompt = tasks.model().encode("w3 w1 w4").unwrap();
    let text = |lm: &Pretrained| {
        let settings = Generation::default().with_temperature(2.0);
        let written = lm.generate(&prompt, &settings, |_| ControlFlow::Continue(()));
        let written = written.unwrap();
        // One token of 16 ends the text, of 100 at most.
        assert!(written.tokens.len() < 100 && written.tokens.ends_with(&[9]));
        written
    };
    let of_base = text(&base);
    assert_eq!(text(tasks.model()), of_base);

    tasks.activate("task").unwrap();
    let served = |lm: &Pretrained| bits(logits(&lm.model, &PROBE, 1));
    assert_eq!(text(tasks.model()), text(&merged));
    assert_eq!(served(tasks.model()), served(&merged));
    assert_ne!(served(tasks.model()), served(&base));
    assert_eq!(tasks.model().stop_tokens(), [9]);
    assert_eq!(tasks.model().certificate, None);
    let dir = parent.path().join("task");
    save(tasks.model(), &dir).unwrap();
    let loaded = load_verified(&dir, &Device::flex()).unwrap();
    assert_eq!(
        Fingerprint::of(&loaded.model),
        Fingerprint::of(&merged.model)
    );
    assert_eq!(loaded.certificate, None);

    tasks.activate(None).unwrap();
    assert_eq!(text(tasks.model()), of_base);
    assert_eq!(served(tasks.model()), served(&base));
}
