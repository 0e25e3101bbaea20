import torch, sys
from pathlib import Path
from data_gen.toyworld import draw_subjects
from pig.methods import *
from pig import methods
from pig.data.subject_training import *
from lightning.pytorch import Trainer
import time
p=Path("/tmp/subj"); 
if not p.exists(): draw_subjects(p, 12, 64)
from pig.models.lora import Lora
for m,o in (("dreambooth",dict(identifier="q",lr=1e-4)),("dreambooth",dict(identifier="q",lr=1e-3,lora=Lora())),("textual_inversion",{})):
    mod=methods.module_class(m)("toyworld",**o)
    data=SubjectDataModule(str(p/"mug_006"),resolution=64, prior=ClassPictures("/tmp/classp",count=8,steps=4))
    t=time.time()
    tr=Trainer(max_steps=10,logger=False,enable_progress_bar=False,enable_checkpointing=False,accelerator="cpu",gradient_clip_val=1.0)
    tr.fit(mod,data); print(m,time.time()-t, len(mod.trainable()))
    pipe=mod.pipeline(); 
    from pig.sampling.delta import save_delta
    import shutil; shutil.rmtree("/tmp/d1",ignore_errors=True); shutil.rmtree("/tmp/w1",ignore_errors=True)
    a=pipe("a photo of a mug, on a beach",class_noun="mug",num_inference_steps=3,output_type="pt",generator=torch.Generator().manual_seed(1)).images
    save_delta(pipe,Path("/tmp/d1")); pipe.save_pretrained("/tmp/w1")
    for f in ("/tmp/d1","/tmp/w1"):
        q=load_pipeline(f,"cpu"); b=q("a photo of a mug, on a beach",class_noun="mug",num_inference_steps=3,output_type="pt",generator=torch.Generator().manual_seed(1)).images
        print(f, torch.equal(a,b), [x.name for x in Path(f).iterdir()])
